import base64
import re
import shutil
import subprocess
import sys
from datetime import date
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

from mscs.results import write_csv, write_json, write_text
from reproduce.cells import TABLES, cells, table_block
from reproduce.curves import draw_losses, mean_curve
from reproduce.report import BLANK, class_table, compared_runs, write_report
from reproduce.settings_tables import DATASETS, stamp, title, typeset_grid
from reproduce.tables import STAMPS, Results

PAIR = ("cityscapes-hrnet-hr48-ce", "cityscapes-hrnet-hr48-ours")
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
VOID = {"meta", "link", "img"}


class Page(HTMLParser):
    """Collects addresses, identifiers and cells, and checks that tags are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.alts: list[str | None] = []
        self.scopes: list[str | None] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [
            value for key, value in attrs if key in ("src", "href", "xlink:href", "srcset", "data")
        ]
        self.ids += [found["id"]] if "id" in found else []
        self.alts += [found.get("alt")] if tag == "img" else []
        self.scopes += [found.get("scope")] if tag == "th" else []
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def write_run(
    folder: Path, run: str, mious: list[float], ious: list[list[float | None]], losses: list[float]
) -> None:
    for seed, (miou, row) in enumerate(zip(mious, ious, strict=True)):
        scores = {"seeds": {str(seed): {"miou": miou, "class_iou": row}}}
        write_json(
            folder / "runs" / run / f"seed-{seed}" / "evaluation.json",
            {"ss": scores, "classes": ["road", "bus <&>", "train"]},
        )
    rows = [{"step": 10 * i, "ce": value, "loss": 2 * value} for i, value in enumerate(losses, 1)]
    write_csv(folder / "runs" / run / "seed-0" / "losses.csv", rows)
    record = {
        "seconds": 61.4,
        "gpu_hours": None,
        "peak_bytes": 2**31,
        "settings": {"seeds": [0], "steps": 30, "batch_size": 8},
        "git": {"commit": "abc123", "dirty": True},
        "packages": {"torch": "2.14.1"},
        "environment": "feedbeef",
        "machine": {
            "os": "Linux",
            "python": "3.11.7",
            "cpu": "Some CPU",
            "cpus": 2,
            "gpus": ["H200", "H200"],
        },
        "image": None,
        "finished": "2026-01-01T00:00:00Z",
    }
    write_json(folder / "runs" / run / "seed-0" / "run.json", record)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Results of one pair of runs, every table, Figs. 1 and 3."""
    folder = tmp_path / "mini"
    write_run(folder, PAIR[0], [39.0, 41.0], [[60.0, 20.0, None], [70.0, 30.0, None]], [3.0, 2.0, 1.0])
    write_run(folder, PAIR[1], [44.0, 45.0], [[64.0, 22.0, None], [68.0, 24.0, None]], [3.5, 1.5, 0.5])
    for name in TABLES:
        block = table_block(name)
        values = [["81.5", f"our {name}", "", "ran"] for _ in block["columns"]]
        line = ["row"] * len(block["header"]) + [text for value in values for text in value]
        write_text(folder / "tables" / f"{name}.csv", ",".join(line) + "\n" + ",".join(line) + "\n")
    for name in ("fig1", "fig3"):
        (folder / "figures").mkdir(exist_ok=True)
        (folder / "figures" / f"{name}.png").write_bytes(PIXEL)
    drawn = {"per_class": 51, "iterations": 401}
    values = {"knn_accuracy": 51.25, "silhouette": 0.125, "distance_ratio": 0.75}
    write_json(
        folder / "figures" / "fig1.json",
        {"with": {"all scales": values}, "points": {"road": 50}, "picture": drawn},
    )
    row = {"id": "frankfurt_7", "rank": "best", "baseline": 40.0, "ours": 52.5, "gain": 12.5, "boxes": {}}
    sheet = {"images": 12, "mean_gain": 1.25, "ours_better": 8, "baseline_better": 3, "rows": [row]}
    write_json(folder / "figures" / "qualitative.json", {"fig3": sheet})
    write_json(folder / "data" / "cityscapes.json", {"digest": "da7a"})
    write_json(folder / "resolved.json", {})
    return folder


@pytest.fixture
def html(folder: Path) -> str:
    write_report(Results("mini", folder.parent))
    return (folder / "report.html").read_text()


def test_page_is_one_self_contained_file(html):
    page = Page(html)
    assert page.addresses
    assert all(address.startswith(("#", "data:")) for address in page.addresses)
    assert "<script" not in html
    assert not re.search(r"@import|url\(", html)
    assert base64.b64encode(PIXEL).decode() in html


def test_page_can_be_navigated_and_heard(html):
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {address[1:] for address in page.addresses if address.startswith("#")} <= set(page.ids)
    assert len(page.alts) == 3
    assert all(page.alts)
    assert set(page.scopes) == {"row", "col", "colgroup"}


def test_page_shows_stamp_and_every_table(html):
    assert html.count(STAMPS["mini"]) == 1
    for name in TABLES:
        assert f"our {name}" in html
        assert table_block(name)["title"] in html.replace("&gt;", ">")


def test_page_shows_results_and_what_they_were_made_with(html):
    for text in (
        "51.2",
        "Up to 51 points a class, 401 iterations; the authors",
        "frankfurt_7",
        "+12.5",
        "abc123 with uncommitted changes",
        "2 x H200",
        "da7a",
        "2.14.1",
    ):
        assert text in html
    assert "bus &lt;&amp;&gt;" in html
    assert "bus <&>" not in html
    assert html.count("Not made yet.") == 2
    assert "weight-decay-cityscapes" in html
    assert "learning-rate-ocrnet-ade20k" not in html


def test_directions_are_judged_in_profile_paper_only(folder, html):
    assert "Directions" not in html
    assert "no direction that the paper reports is judged" in html
    shutil.copytree(folder, folder.with_name("paper"))
    write_report(Results("paper", folder.parent))
    page = (folder.with_name("paper") / "report.html").read_text()
    # one direction of Table 2(b) is measured, +4.5 with a standard error of 1.1; all others are not run
    assert re.search(r"<dd>1\s*<small>of 1 measured", page)
    assert '<span class="holds">holds (+4.5)' in page


def test_class_table_averages_seeds_and_drops_absent_classes(folder):
    view = class_table(Results("mini", folder.parent), *PAIR)
    assert view is not None
    assert view["rows"] == [["road", "65.0", "66.0", "+1.0"], ["bus <&>", "25.0", "23.0", "-2.0"]]
    assert view["mean"] == ["mean", "40.0", "44.5", "+4.5"]


def test_curves_are_means_over_seeds(tmp_path):
    paths = [tmp_path / f"seed-{seed}" / "losses.csv" for seed in (0, 1)]
    for path, seed in zip(paths, (0, 1), strict=True):
        write_csv(path, [{"step": step, "ce": step + seed} for step in (20, 10)])
    assert mean_curve(paths, "ce") == ([10.0, 20.0], [10.5, 20.5])


def test_curves_are_the_same_bytes_for_the_same_losses(folder):
    files = [[folder / "runs" / run / "seed-0" / "losses.csv"] for run in PAIR]
    picture, last = draw_losses(*files)
    assert last == "CE, trained with CE 1.000, CE, trained with ours 0.500, total loss of ours 1.000"
    texts = {node.text for node in ElementTree.fromstring(picture).iter() if node.tag.endswith("text")}
    assert {"CE, trained with CE", "total loss of ours", "training step", "30"} <= texts
    assert draw_losses(*files)[0] == picture
    assert str(date.today().year).encode() not in picture
    assert draw_losses(files[0], []) is None


def test_pairs_differ_in_the_loss_alone(params):
    pairs = dict(compared_runs(params, params.runs))
    assert pairs["cityscapes-hrnet-hr48-ce-b8-40k"] == "cityscapes-hrnet-hr48-ours-b8-40k"
    # two projectors were tried: the one of Fig. 2, and the first
    assert pairs["ade20k-upernet-swins-ce"] == "ade20k-upernet-swins-ours"
    assert pairs["cityscapes-upernet-swins-ce"] == "cityscapes-upernet-swins-ours"
    losses = {run: params.resolve(run).settings.loss.name for run in params.runs}
    assert {run for run, loss in losses.items() if loss == "ce"} == set(pairs)
    assert compared_runs(params, ["cityscapes-hrnet-hr48-ce", "cityscapes-hrnet-hr48-ours-b8-40k"]) == []


def test_report_of_nothing_says_what_is_missing(tmp_path):
    (tmp_path / "paper").mkdir()
    write_report(Results("paper", tmp_path))
    html = (tmp_path / "paper" / "report.html").read_text()
    Page(html)
    assert "Not made yet: 1a, 1b, 2a, 2b, 3." in html
    assert "No pair of runs has been trained yet." in html
    assert "not comparable" not in html


def test_report_needs_no_torch():
    code = "import reproduce.report, sys; print([m for m in ('torch', 'timm') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"


def test_every_row_of_the_settings_is_in_the_report(html, params):
    assert stamp(params) in html
    for table in DATASETS:
        assert f"<summary>{title(table)}</summary>" in html
        for row in typeset_grid(table, params):
            heads, values = (f'<th scope="row">{text}</th>' for text in row[:2]), row[2:]
            assert "".join([*heads, *(f"<td>{text}</td>" for text in values)]) in html


def test_before_measuring_the_report_says_how_to_get_the_memory(html):
    assert "Not measured yet: <code>python -m reproduce memory</code> on a CUDA GPU" in html


def test_memory_of_each_row_stands_beside_the_dense_formulas_and_the_papers(folder):
    measured = [cell for cell in cells("2a") if cell.read == "memory"]
    assert len(measured) == 5
    assert "stride 8" in measured[1].row
    runs = {
        cell.run: {"dense_gb": 20.5 + i if i else "OOM", "ours_gb": 5.25 + i}
        for i, cell in enumerate(measured)
    }
    write_json(folder / "memory.json", {"device": "Some GPU", "cap_gb": 24.0, "runs": runs})
    write_report(Results("mini", folder.parent))
    html = (folder / "report.html").read_text()
    Page(html)
    assert "Measured on Some GPU, limited to 24 GiB." in html
    assert "Not measured yet" not in html
    for i, cell in enumerate(measured):
        values = [str(cell.paper or BLANK), str(20.5 + i) if i else "OOM", str(5.25 + i)]
        row = f'<th scope="row">{escape(cell.row)}</th>' + "".join(f"<td>{text}</td>" for text in values)
        assert row in html
