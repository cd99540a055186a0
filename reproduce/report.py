"""Result files of one profile -> report.html, one self-contained file.

Reads finished files only (and so starts quickly); what has not been made yet is named as missing.
"""

import base64
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mscs.blocks import keys
from mscs.params import Params, load_params
from mscs.results import read_json, write_text
from mscs.settings import Loss, Settings
from reproduce import ledger, settings_tables
from reproduce.cells import FIGURE_RUNS, TABLES, TSNE_RUNS, cells, claims, table_block
from reproduce.curves import draw_losses
from reproduce.rendering import render
from reproduce.tables import Results, directions, label, notes

BLANK = "–"
VALUES_PER_COLUMN = 4
NETWORKS = {
    "fig1": "UPerNet with ResNet-101 on Cityscapes val",
    "fig2": "UPerNet with Swin-S on ADE20K val",
    "fig3": "HRNet on Cityscapes val",
    "fig4": "OCRNet with ResNet-50 on CaDIS val, task 3",
}


def write_report(profile: str, folder: Path) -> None:
    """Write report.html into `folder`, the profile's results folder, from what lies there."""
    params, results = load_params(), Results(profile, folder.parent)
    runs = sorted(path.name for path in (folder / "runs").glob("*") if path.is_dir())
    records = {run: record for run in runs if (record := results.record(run))}
    pairs = compared_runs(params, runs)
    tables = [table for name in TABLES if (table := read_table(name, results))]
    losses = {pair: [results.seed_files(run, "losses.csv") for run in pair] for pair in pairs}
    curves = {pair: draw_losses(*files) for pair, files in losses.items()}
    pictures = {path.stem: path for path in sorted((folder / "figures").glob("*.png"))}
    separation = results.read("figures/fig1.json")
    facts = {
        "profile": profile,
        "stamp": results.stamp,
        "summary": summarise(tables),
        "tables": tables,
        "missing": [name for name in TABLES if label(name) not in {table["name"] for table in tables}],
        "memory": results.read("memory.json"),
        "memory_cells": [cell for cell in cells("2a") if cell.read == "memory"],
        "settings_stamp": settings_tables.stamp(params),
        "settings": settings_views(params),
        "networks": NETWORKS,
        "figures": {name: _address(path.read_bytes(), "png") for name, path in pictures.items()},
        "picture": separation.get("picture"),
        "separation": {run: spaces for run, spaces in separation.items() if run not in ("points", "picture")},
        "sheets": results.read("figures/qualitative.json"),
        "curves": [
            {"title": _pair_name(pair), "address": _address(found[0], "svg+xml"), "last": found[1]}
            for pair, found in curves.items()
            if found
        ],
        "class_tables": [view for pair in pairs if (view := class_table(results, *pair))],
        "records": records,
        "scores": {run: results.score(run, "ss").number for run in records},
        "provenance": provenance(folder, list(records.values())),
        "ledger": ledger_entries({run: records.get(run, {}) for run in runs}),
    }
    write_text(folder / "report.html", render("report.html.j2", facts))


def compared_runs(params: Params, runs: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs among `runs` of cross-entropy and the paper's loss that differ in the loss alone.

    Where several projectors were tried, the one of a figure or a claim, else the first in params.yaml.
    """
    settings = {run: params.resolve(run, "paper").settings for run in params.runs if run in runs}
    chosen = {*FIGURE_RUNS.values(), TSNE_RUNS, *((claim.worse, claim.better) for claim in claims())}
    rest = {run: _without_loss(found) for run, found in settings.items()}
    pairs = []
    for ce in (run for run in settings if settings[run].loss.name == "ce"):
        fits = [run for run in settings if settings[run].loss.name == "ours" and rest[run] == rest[ce]]
        if fits:
            pairs.append((ce, max(fits, key=lambda run: (ce, run) in chosen)))
    return pairs


def _without_loss(settings: Settings) -> dict[str, Any]:
    """Return what decides a training beside its loss."""
    ignored = {*keys(Loss), "run", "numerics"}
    return {key: value for key, value in settings.identity("train").items() if key not in ignored}


def read_table(name: str, results: Results) -> dict[str, Any] | None:
    """Return a table as the tables stage wrote it, with the directions and notes; None before that stage.

    A row is its header cells, and paper, ours, difference and status of each column.
    """
    path = results.root / "tables" / f"{name}.csv"
    if not path.exists():
        return None
    block = table_block(name)
    _, *lines = csv.reader(io.StringIO(path.read_text()))
    first = len(block["header"])
    return {
        "name": label(name),
        **{key: block[key] for key in ("title", "origin", "header")},
        "columns": list(block["columns"].values()),
        "rows": [
            (
                line[:first],
                [line[i : i + VALUES_PER_COLUMN] for i in range(first, len(line), VALUES_PER_COLUMN)],
            )
            for line in lines
        ],
        "directions": directions(results, name),
        "notes": notes(name),
    }


def summarise(tables: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return how many reported directions hold, and how many cells have which status."""
    verdicts = Counter(found.status for table in tables for found in table["directions"])
    statuses = Counter(cell[-1] for table in tables for _, row in table["rows"] for cell in row if cell[-1])
    return {
        "hold": verdicts["holds"],
        "measured": verdicts.total() - verdicts["not run"],
        "claimed": verdicts.total(),
        "statuses": statuses.most_common(),
    }


def settings_views(params: Params) -> list[dict[str, Any]]:
    """Return title, header and rows of Tables 4 to 7: the paper's training settings, from params.yaml."""
    views = []
    for table in settings_tables.DATASETS:
        rows = settings_tables.grid(
            settings_tables.settings_rows(table, params), settings_tables.unicode_power, "×"
        )
        views.append({"title": settings_tables.title(table), "header": settings_tables.HEADER, "rows": rows})
    return views


def _address(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def class_table(results: Results, baseline: str, ours: str) -> dict[str, Any] | None:
    """Return per-class IoU in percent of a pair, single scale, means over seeds; None before evaluation."""
    found = [record for run in (baseline, ours) if (record := results.evaluation(run)) and "ss" in record]
    if len(found) < 2:
        return None
    values = (_class_means(record["ss"]) for record in found)
    rows = [
        [name, *_compared(a, b)]
        for name, a, b in zip(found[0]["classes"], *values, strict=True)
        if a is not None or b is not None
    ]
    return {
        "title": _pair_name((baseline, ours)),
        "rows": rows,
        "mean": ["mean", *_compared(*(record["ss"]["miou"] for record in found))],
    }


def _class_means(record: Mapping[str, Any]) -> list[float | None]:
    by_seed = [entry["class_iou"] for entry in record["seeds"].values()]
    columns = ([value for value in column if value is not None] for column in zip(*by_seed, strict=True))
    return [sum(column) / len(column) if column else None for column in columns]


def _compared(a: float | None, b: float | None) -> list[str]:
    gain = BLANK if a is None or b is None else f"{b - a:+.1f}"
    return [_number(a), _number(b), gain]


def _number(value: float | None) -> str:
    return BLANK if value is None else f"{value:.1f}"


def _pair_name(pair: tuple[str, str]) -> str:
    return " and ".join(pair)


def provenance(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what the results were made with: per kind the distinct values, with their runs."""
    resolved = folder / "resolved.json"
    manifests = sorted((folder / "data").glob("*.json"))
    found = {
        "git commit": [_commit(record["git"]) for record in records],
        "packages": [", ".join(f"{k} {v}" for k, v in record["packages"].items()) for record in records],
        "environment digest": [record["environment"] for record in records],
        "machine": [_machine(record["machine"]) for record in records],
        "container image": [record["image"] for record in records if record.get("image")],
    }
    return {
        "settings digest (resolved.json)": [
            hashlib.sha256(resolved.read_bytes()).hexdigest()[:16] if resolved.exists() else BLANK
        ],
        "data digests": [f"{path.stem}: {read_json(path).get('digest', BLANK)}" for path in manifests],
        **{kind: _distinct(values) for kind, values in found.items() if values},
    }


def _commit(state: Mapping[str, Any]) -> str:
    return (state["commit"] or "unknown") + (" with uncommitted changes" if state["dirty"] else "")


def _machine(facts: Mapping[str, Any]) -> str:
    gpus = [f"{n} x {name}" for name, n in Counter(facts.get("gpus", [])).items()]
    return ", ".join([f"{facts['cpus']} x {facts['cpu']}", *gpus, facts["os"], f"Python {facts['python']}"])


def _distinct(values: Iterable[str]) -> list[str]:
    counts = Counter(values)
    return [value if len(counts) == 1 else f"{value} ({n} runs)" for value, n in counts.items()]


def ledger_entries(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the ledger's entries that touch any of the runs, in the ledger's order."""
    found = {
        row["id"]: row
        for run, record in records.items()
        for row in ledger.rows(run, record.get("settings", {}).get("recipe", "paper"))
    }
    return [found[row["id"]] for row in ledger.rows() if row["id"] in found]
