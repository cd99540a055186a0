"""Result files of one profile -> report.html, one self-contained file, and report.md, the same in Markdown.

Reads finished files only (and so starts quickly); what has not been made yet is named as missing.
"""

import base64
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from mscs.params import Params, load_params
from mscs.results import read_json, write_text
from reproduce import ledger, settings_tables
from reproduce.cells import TABLES, cells, claims, table_block
from reproduce.tables import Results, notes

BLANK = "–"
VALUES_PER_COLUMN = 4
COSTS = ["run", "mIoU", "seeds", "steps", "batch", "seconds", "GPU GiB", "finished"]
CHART = {"width": 320, "height": 150, "left": 30, "right": 6, "top": 8, "bottom": 20}
MEMORY = ["row of Table 2(a)", "paper (GB)", "dense formula (GiB)", "this package (GiB)"]
MEMORY_RULE = (
    "Peak of PyTorch's allocator in training steps on one GPU's two crops of 512x1024, pixels and labels "
    "drawn at random. The dense formula holds every pairwise similarity; this package computes the same loss "
    "in tiles. The paper does not say how it measured."
)
MEMORY_MISSING = "Not measured yet: `python -m reproduce memory` on a CUDA GPU, then this report again."
NETWORKS = {
    "fig1": "UPerNet with ResNet-101 on Cityscapes val",
    "fig2": "UPerNet with Swin-S on ADE20K val",
    "fig3": "HRNet on Cityscapes val",
    "fig4": "OCRNet with ResNet-50 on CaDIS val, task 3",
}
SHEET_RULE = (
    "Rows: the best, the median and the worst images by gain (per-image mIoU, ours minus CE, in points), in "
    "equal shares. Boxes: the largest connected regions that only one network gets right, up to three for "
    "each: solid white for ours, dashed orange for the baseline."
)
TSNE_RULE = (
    "t-SNE of the backbone's features at stride 4 as they are, without (top) and with (bottom) the "
    "contrastive loss; colour and marker show the class. As in the authors' code: up to 1000 points a class, "
    "2000 iterations (profile mini: 50 and 400). The numbers are not in the paper; they are measured in "
    "feature space, not in the picture."
)


@dataclass(frozen=True)
class Table:
    """One of the paper's tables as text: per row its header cells, and paper, ours, difference, status."""

    name: str
    title: str
    origin: str
    header: list[str]
    columns: list[str]
    rows: list[tuple[list[str], list[list[str]]]]
    directions: list[tuple[str, float | None, str]]
    notes: list[str]


@dataclass(frozen=True)
class Figure:
    """One picture: a data address, what it shows, and the numbers that belong to it."""

    name: str
    title: str
    caption: str
    alt: str
    file: str
    address: str | None
    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Chart:
    """Loss curves of a pair of runs in the coordinates of `CHART`."""

    title: str
    lines: list[tuple[str, str, str]]
    """(style, label, points of an SVG polyline)."""
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    last: str


def write_report(profile: str, folder: Path) -> None:
    """Write report.html and report.md into `folder`, the profile's results folder, from what lies there."""
    params = load_params()
    results = Results(profile, folder.parent)
    runs = sorted(path.name for path in (folder / "runs").glob("*") if path.is_dir())
    pairs = [(run, _partner(run)) for run in runs if _partner(run) in runs and _partner(run) != run]
    records = {run: _read(folder / "runs" / run / "run.json") for run in runs}
    tables = [table for name in TABLES if (table := read_table(name, results)) is not None]
    context = {
        "profile": profile,
        "stamp": results.stamp,
        "summary": summarise(tables, profile),
        "tables": tables,
        "missing": [name for name in TABLES if not any(table.name == _label(name) for table in tables)],
        "memory_header": MEMORY,
        "memory_rule": MEMORY_RULE,
        "memory_missing": MEMORY_MISSING,
        "memory": memory_view(_read(folder / "memory.json")),
        "settings_stamp": settings_tables.stamp(params),
        "settings": settings_views(params),
        "figures": read_figures(folder / "figures"),
        "charts": [chart for pair in pairs if (chart := draw_losses(folder / "runs", *pair))],
        "chart": CHART,
        "class_tables": [view for pair in pairs if (view := class_table(results, *pair))],
        "cost_header": COSTS,
        "costs": [_cost(run, record, results) for run, record in records.items() if record],
        "provenance": provenance(folder, [record for record in records.values() if record]),
        "ledger": ledger_grid(records),
    }
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    write_text(folder / "report.html", templates.get_template("report.html.j2").render(context))
    write_text(folder / "report.md", as_markdown(context, folder))


def read_table(name: str, results: Results) -> Table | None:
    """Return a table as the tables stage wrote it, with the directions and notes; None before that stage."""
    path = results.root / "tables" / f"{name}.csv"
    if not path.exists():
        return None
    block = table_block(name)
    _, *grid = csv.reader(io.StringIO(path.read_text()))
    labels = len(block["header"])
    rows = []
    for line in grid:
        values = line[labels:]
        starts = range(0, len(values), VALUES_PER_COLUMN)
        rows.append((line[:labels], [values[i : i + VALUES_PER_COLUMN] for i in starts]))
    directions = [(claim.text, *results.claim(claim)) for claim in claims(name)]
    columns = list(block["columns"].values())
    header = list(block["header"])
    return Table(
        _label(name), block["title"], block["origin"], header, columns, rows, directions, notes(name)
    )


def _label(name: str) -> str:
    return f"Table {name[0]}" + (f"({name[1:]})" if len(name) > 1 else "")


def summarise(tables: Sequence[Table], profile: str) -> dict[str, Any]:
    """Return how many reported directions hold, and how many cells have which status."""
    verdicts = Counter(verdict for table in tables for _, _, verdict in table.directions)
    statuses = Counter(cell[-1] for table in tables for _, cells in table.rows for cell in cells if cell[-1])
    return {
        "hold": verdicts["as in the paper"],
        "measured": sum(verdicts.values()) - verdicts["not run"],
        "claimed": sum(verdicts.values()),
        "statuses": statuses.most_common(),
        "comparable": profile != "mini",
    }


def memory_view(measured: Mapping[str, Any]) -> dict[str, Any]:
    """Return where Table 2(a)'s memory was measured, and its rows; nothing before memory.json is there."""
    runs = measured.get("runs", {})
    rows = [
        [cell.row, str(cell.paper or BLANK), *(str(runs[cell.run][key]) for key in ("dense_gb", "ours_gb"))]
        for cell in cells("2a")
        if cell.read == "memory" and cell.run in runs
    ]
    where = f"Measured on {measured['device']}, limited to {measured['cap_gb']:g} GiB." if rows else ""
    return {"where": where, "rows": rows}


def settings_views(params: Params) -> list[dict[str, Any]]:
    """Return title, header and rows of Tables 4 to 7: the paper's training settings, from params.yaml."""
    views = []
    for table in settings_tables.DATASETS:
        settings = settings_tables.settings_rows(table, params)
        header, *rows = settings_tables.grid(settings, settings_tables.unicode_power, "×")
        views.append({"title": settings_tables.title(table), "header": header, "rows": rows})
    return views


def read_figures(folder: Path) -> list[Figure]:
    """Return Fig. 1 with its measured separation, and Figs. 2 to 4 with their gains."""
    separation, sheets = _read(folder / "fig1.json"), _read(folder / "qualitative.json")
    measures = ["features", "network", "5-NN accuracy (%)", "silhouette", "intra/inter distance"]
    rows = _separation_rows(separation)
    title = f"Feature space of {NETWORKS['fig1']}"
    figures = [_figure(folder, "fig1", "Fig. 1", title, TSNE_RULE, measures, rows)]
    if (folder / "fig1-scales.png").exists():
        caption = "Not in the paper: all scales together and each on its own, vectors of length 1."
        figures.append(_figure(folder, "fig1-scales", "Fig. 1, by scale", title, caption, [], []))
    header = ["row", "image", "CE mIoU", "ours mIoU", "gain"]
    for name in list(NETWORKS)[1:]:
        sheet = sheets.get(name, {})
        lines = [
            [row["rank"], row["id"], *(f"{row[k]:.1f}" for k in ("baseline", "ours")), f"{row['gain']:+.1f}"]
            for row in sheet.get("rows", [])
        ]
        counts = ""
        if sheet:
            counts = (
                f" Over all {sheet['images']} images ours is better on {sheet['ours_better']}, the baseline "
                f"on {sheet['baseline_better']}; mean gain {sheet['mean_gain']:+.2f} points."
            )
        title = f"Comparison of {NETWORKS[name]}"
        figures.append(_figure(folder, name, f"Fig. {name[3:]}", title, SHEET_RULE + counts, header, lines))
    return figures


def _figure(
    folder: Path, file: str, name: str, title: str, caption: str, header: list[str], rows: list[list[str]]
) -> Figure:
    path = folder / f"{file}.png"
    address = None
    if path.exists():
        address = "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    alt = f"{name}: {title}. {caption.split('.')[0]}."
    return Figure(name, title, caption, alt, f"figures/{file}.png", address, header, rows)


def _separation_rows(separation: Mapping[str, Any]) -> list[list[str]]:
    runs = {run: spaces for run, spaces in separation.items() if run not in ("points", "picture")}
    spaces = list(dict.fromkeys(space for found in runs.values() for space in found))
    return [
        [space, run, f"{m['knn_accuracy']:.1f}", f"{m['silhouette']:+.3f}", f"{m['distance_ratio']:.3f}"]
        for space in spaces
        for run, found in runs.items()
        if (m := found.get(space))
    ]


def draw_losses(folder: Path, baseline: str, ours: str) -> Chart | None:
    """Return the loss curves of a pair: cross-entropy of both, and the total of ours; means over seeds."""
    parts = [
        ("ce", baseline, "ce", "CE alone"),
        ("ours", ours, "ce", "CE, with ours"),
        ("total", ours, "loss", "total"),
    ]
    curves = [(style, label, _curve(folder / run / "losses.csv", key)) for style, run, key, label in parts]
    if not all(points for _, _, points in curves):
        return None
    right = max(step for _, _, points in curves for step, _ in points)
    top = _ceiling(max(value for _, _, points in curves for _, value in points))
    x0, x1 = CHART["left"], CHART["width"] - CHART["right"]
    y0, y1 = CHART["height"] - CHART["bottom"], CHART["top"]

    def place(step: float, value: float) -> tuple[float, float]:
        return x0 + (x1 - x0) * step / right, y0 + (y1 - y0) * value / top

    lines = [
        (style, label, " ".join("{:.1f},{:.1f}".format(*place(*point)) for point in points))
        for style, label, points in curves
    ]
    x_ticks = [(place(right * part / 2, 0)[0], f"{right * part / 2:g}") for part in range(3)]
    y_ticks = [(place(0, top * part / 2)[1], f"{top * part / 2:g}") for part in range(3)]
    last = ", ".join(f"{label} {points[-1][1]:.3f}" for _, label, points in curves)
    return Chart(_pair_name(baseline), lines, x_ticks, y_ticks, last)


def _curve(path: Path, key: str) -> list[tuple[float, float]]:
    """Return (step, mean over seeds) of one column of losses.csv."""
    values: dict[float, list[float]] = {}
    if path.exists():
        for row in csv.DictReader(io.StringIO(path.read_text())):
            values.setdefault(float(row["step"]), []).append(float(row[key]))
    return [(step, sum(found) / len(found)) for step, found in sorted(values.items())]


def _ceiling(value: float) -> float:
    """Return the next value whose half is a round number."""
    scale = 1.0
    while value / scale > 10:
        scale *= 10
    return next(step for step in (1, 2, 3, 4, 5, 6, 8, 10) if step * scale >= value) * scale


def class_table(results: Results, baseline: str, ours: str) -> dict[str, Any] | None:
    """Return per-class IoU in percent of a pair, single scale, means over seeds; None before evaluation."""
    found = [results.evaluation(run) for run in (baseline, ours)]
    if not all(record and "ss" in record for record in found):
        return None
    first, second = (_class_means(record["ss"]) for record in found if record)
    rows = []
    for name, a, b in zip((found[0] or {})["classes"], first, second, strict=True):
        if a is not None or b is not None:
            gain = f"{b - a:+.1f}" if a is not None and b is not None else BLANK
            rows.append([name, _number(a), _number(b), gain])
    means = [record["ss"]["miou"] for record in found if record]
    mean = ["mean", *map(_number, means), f"{means[1] - means[0]:+.1f}"]
    return {"title": _pair_name(baseline), "rows": rows, "mean": mean}


def _class_means(record: Mapping[str, Any]) -> list[float | None]:
    by_seed = [entry["class_iou"] for entry in record["seeds"].values()]
    columns = ([value for value in column if value is not None] for column in zip(*by_seed, strict=True))
    return [sum(column) / len(column) if column else None for column in columns]


def _number(value: float | None) -> str:
    return BLANK if value is None else f"{value:.1f}"


def _partner(run: str) -> str:
    """Return the run with the contrastive loss that a cross-entropy run is compared with."""
    return "-".join("ours" if part == "ce" else part for part in run.split("-"))


def _pair_name(baseline: str) -> str:
    return "-".join(part for part in baseline.split("-") if part != "ce")


def _cost(run: str, record: Mapping[str, Any], results: Results) -> list[str]:
    settings = record["settings"]
    score = results.score(run, "ss").number
    memory = record.get("peak_bytes")
    return [
        run,
        _number(score if isinstance(score, float) else None),
        str(len(settings["seeds"])),
        str(settings["steps"]),
        str(settings["batch_size"]),
        f"{record['seconds']:.0f}",
        BLANK if memory is None else f"{memory / 2**30:.1f}",
        record["finished"],
    ]


def provenance(folder: Path, records: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return what the results were made with: per kind the distinct values, with the runs of each."""
    resolved = folder / "resolved.json"
    digest = hashlib.sha256(resolved.read_bytes()).hexdigest()[:16] if resolved.exists() else BLANK
    data = {
        path.stem: read_json(path).get("digest", BLANK) for path in sorted((folder / "data").glob("*.json"))
    }
    found = {
        "git commit": [_commit(record["git"]) for record in records],
        "packages": [", ".join(f"{k} {v}" for k, v in record["packages"].items()) for record in records],
        "environment digest": [record["environment"] for record in records],
        "machine": [_machine(record["machine"]) for record in records],
        "container image": [record["image"] for record in records if record.get("image")],
    }
    shared = [(kind, _distinct(values)) for kind, values in found.items() if values]
    settings = ("settings digest (resolved.json)", [digest])
    return [settings, ("data digests", [f"{name}: {value}" for name, value in data.items()]), *shared]


def _commit(state: Mapping[str, Any]) -> str:
    return (state["commit"] or "unknown") + (" with uncommitted changes" if state["dirty"] else "")


def _machine(facts: Mapping[str, Any]) -> str:
    gpus = [f"{n} x {name}" for name, n in Counter(facts.get("gpus", [])).items()]
    return ", ".join([f"{facts['cpus']} x {facts['cpu']}", *gpus, facts["os"], f"Python {facts['python']}"])


def _distinct(values: Iterable[str]) -> list[str]:
    counts = Counter(values)
    return [value if len(counts) == 1 else f"{value} ({n} runs)" for value, n in counts.items()]


def ledger_grid(records: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """Return header and rows of the ledger's entries that touch any of the runs, in the ledger's order."""
    found = {
        row["id"]: row
        for run, record in records.items()
        for row in ledger.rows(run, record.get("settings", {}).get("recipe", "paper"))
    }
    rows = [found[row["id"]] for row in ledger.rows() if row["id"] in found]
    return [list(rows[0]), *(list(row.values()) for row in rows)] if rows else []


def _read(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def as_markdown(context: Mapping[str, Any], folder: Path) -> str:
    """Return the report as Markdown; figures are links, loss curves their last values."""
    summary = context["summary"]
    statuses = ", ".join(f"{n} {status}" for status, n in summary["statuses"]) or "none"
    parts = [
        "# Multi-scale and cross-scale contrastive learning: results",
        f"**{context['stamp']}**",
        f"Directions as in the paper: {summary['hold']} of {summary['measured']} measured "
        f"({summary['claimed']} reported). Cells: {statuses}.",
        "## Tables",
        *(
            (folder / "tables" / f"{name}.md").read_text().strip()
            for name in TABLES
            if name not in context["missing"]
        ),
        *(f"{_label(name)}: not made yet." for name in context["missing"]),
        "### GPU memory",
        MEMORY_RULE,
        _grid(MEMORY, context["memory"]["rows"]) or MEMORY_MISSING,
        context["memory"]["where"],
        "## Settings (Tables 4 to 7)",
        f"*{context['settings_stamp']}*",
    ]
    for view in context["settings"]:
        parts += [f"### {view['title']}", _grid(view["header"], view["rows"])]
    parts += ["## Figures"]
    for figure in context["figures"]:
        picture = f"![{figure.alt}]({figure.file})" if figure.address else "Not made yet."
        parts += [
            f"### {figure.name}. {figure.title}",
            picture,
            figure.caption,
            _grid(figure.header, figure.rows),
        ]
    losses = [[chart.title, chart.last] for chart in context["charts"]]
    parts += ["## Losses at the end of training", _grid(["runs", "loss"], losses), "## Per-class IoU"]
    for view in context["class_tables"]:
        parts += [
            f"### {view['title']}",
            _grid(["class", "CE", "ours", "gain"], [*view["rows"], view["mean"]]),
        ]
    facts = [[kind, value] for kind, values in context["provenance"] for value in values]
    parts += ["## Costs", _grid(COSTS, context["costs"]), "## Provenance", _grid(["what", "value"], facts)]
    if context["ledger"]:
        header, *rows = context["ledger"]
        parts += ["## Where the sources disagree", _grid(header, rows)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _grid(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return ""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(text).replace("|", "\\|") for text in line) + " |" for line in lines
    )
