"""Result files of one profile -> report.html, one self-contained file.

Reads finished files only (and so starts quickly); what has not been made yet is named as missing.
"""

import base64
import csv
import hashlib
import io
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mscs.blocks import flat_types
from mscs.params import Params
from mscs.results import read_json, write_text
from mscs.settings import Loss
from reproduce import ledger, settings_tables
from reproduce.cells import FIGURE_RUNS, TABLES, TSNE_RUNS, cells, claims, table_block
from reproduce.curves import draw_losses
from reproduce.rendering import render
from reproduce.tables import Results, directions, label, notes

BLANK = "–"
VALUES_PER_COLUMN = 4


def write_report(results: Results) -> Path:
    """Write report.html into the profile's results folder, from what lies there; return its path."""
    params, folder = results.params, results.root
    runs = sorted(path.name for path in (folder / "runs").glob("*") if path.is_dir())
    records = {run: record for run in runs if (record := results.record(run))}
    pairs = compared_runs(params, runs)
    tables = [table for name in TABLES if (table := read_table(name, results))]
    losses = {pair: [results.seed_files(run, "losses.csv") for run in pair] for pair in pairs}
    curves = {pair: draw_losses(*files) for pair, files in losses.items()}
    pictures = {path.stem: path for path in sorted((folder / "figures").glob("*.png"))}
    separation = results.read("figures/fig1.json")
    facts = {
        "profile": results.profile,
        "stamp": results.stamp,
        "summary": summarise(tables),
        "tables": tables,
        "missing": [name for name in TABLES if label(name) not in {table["name"] for table in tables}],
        "memory": results.read("memory.json"),
        "memory_cells": [cell for cell in cells("2a") if cell.read == "memory"],
        "settings_stamp": settings_tables.stamp(params),
        "settings_header": settings_tables.HEADER,
        "settings": {
            settings_tables.title(table): settings_tables.typeset_grid(table, params)
            for table in settings_tables.DATASETS
        },
        "networks": {
            figure: shown_network(params, pair[0], results.profile)
            for figure, pair in {"fig1": TSNE_RUNS, **FIGURE_RUNS}.items()
            if pair[0] in params.runs_of(results.profile)
        },
        "figures": {name: _address(path.read_bytes(), "png") for name, path in pictures.items()},
        "picture": separation.pop("picture", None),
        "separation": {run: spaces for run, spaces in separation.items() if run != "points"},
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
    path = folder / "report.html"
    write_text(path, render("report.html.j2", facts))
    return path


def shown_network(params: Params, run: str, profile: str) -> str:
    """Return which network, trained on what, a figure shows."""
    settings = params.resolve(run, profile).settings
    data = settings.data
    task = f", task {data.task}" if data.task else ""
    return f"{settings.model.name} with {settings.model.backbone} on {data.name} {data.score_split}{task}"


def compared_runs(params: Params, runs: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs among `runs` of cross-entropy and the paper's loss that differ in the loss alone.

    Where several projectors were tried, the one of a figure or a claim, else the first in params.yaml.
    """
    chosen = {*FIGURE_RUNS.values(), TSNE_RUNS, *((claim.worse, claim.better) for claim in claims())}
    ignored = {*flat_types(Loss), "run", "numerics"}
    by_rest: dict[str, dict[str, list[str]]] = {}
    for run in (run for run in params.runs if run in runs):
        settings = params.resolve(run, "paper").settings
        rest = {key: value for key, value in settings.identity("train").items() if key not in ignored}
        by_rest.setdefault(repr(rest), {}).setdefault(settings.loss.name, []).append(run)
    return [
        (ce, max(alike["ours"], key=lambda run: (ce, run) in chosen))
        for alike in by_rest.values()
        for ce in (alike["ce"] if "ours" in alike and "ce" in alike else ())
    ]


def read_table(name: str, results: Results) -> dict[str, Any] | None:
    """Return a table as the tables stage wrote it, with the directions and notes; None before that stage.

    A row is its header cells, and paper, ours, difference and status of each column.
    """
    path = results.root / "tables" / f"{name}.csv"
    if not path.exists():
        return None
    block = table_block(name)
    first = len(block["header"])
    _, *lines = csv.reader(io.StringIO(path.read_text()))
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


def _address(picture: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(picture).decode()}"


def class_table(results: Results, *pair: str) -> dict[str, Any] | None:
    """Return per-class IoU in percent of a pair, single scale, means over seeds; None before evaluation."""
    found = [record for run in pair if (record := results.evaluation(run)) and "ss" in record]
    if len(found) < 2:
        return None
    values = zip(*(_class_means(record["ss"]) for record in found), strict=True)
    rows = [
        [name, *_compared(*means)]
        for name, means in zip(found[0]["classes"], values, strict=True)
        if means != (None, None)
    ]
    mean = ["mean", *_compared(*(record["ss"]["miou"] for record in found))]
    return {"title": _pair_name(pair), "rows": rows, "mean": mean}


def _class_means(record: Mapping[str, Any]) -> list[float | None]:
    by_seed = [entry["class_iou"] for entry in record["seeds"].values()]
    columns = ([value for value in column if value is not None] for column in zip(*by_seed, strict=True))
    return [sum(column) / len(column) if column else None for column in columns]


def _compared(a: float | None, b: float | None) -> list[str]:
    shown = [BLANK if value is None else f"{value:.1f}" for value in (a, b)]
    return [*shown, BLANK if a is None or b is None else f"{b - a:+.1f}"]


def _pair_name(pair: Sequence[str]) -> str:
    return " and ".join(pair)


def provenance(folder: Path, records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return what the results were made with: per kind the distinct values, with their runs."""
    resolved = folder / "resolved.json"
    settings = hashlib.sha256(resolved.read_bytes()).hexdigest()[:16] if resolved.exists() else BLANK
    manifests = sorted((folder / "data").glob("*.json"))
    found: dict[str, list[str]] = {
        "settings digest (resolved.json)": [settings],
        "data digests": [f"{path.stem}: {read_json(path).get('digest', BLANK)}" for path in manifests],
    }
    kinds: dict[str, Callable[[Mapping[str, Any]], str | None]] = {
        "git commit": lambda record: _commit(record["git"]),
        "packages": lambda record: ", ".join(f"{k} {v}" for k, v in record["packages"].items()),
        "environment digest": lambda record: record["environment"],
        "machine": lambda record: _machine(record["machine"]),
        "container image": lambda record: record.get("image"),
    }
    for kind, text in kinds.items():
        counts = Counter(value for value in map(text, records) if value)
        if counts:
            found[kind] = [x if len(counts) == 1 else f"{x} ({n} runs)" for x, n in counts.items()]
    return found


def _commit(state: Mapping[str, Any]) -> str:
    return (state["commit"] or "unknown") + (" with uncommitted changes" if state["dirty"] else "")


def _machine(facts: Mapping[str, Any]) -> str:
    gpus = [f"{n} x {name}" for name, n in Counter(facts.get("gpus", [])).items()]
    return ", ".join([f"{facts['cpus']} x {facts['cpu']}", *gpus, facts["os"], f"Python {facts['python']}"])


def ledger_entries(records: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return the ledger's entries that touch any of the runs, in the ledger's order."""
    found = {
        row["id"]: row
        for run, record in records.items()
        for row in ledger.rows(run, record.get("settings", {}).get("recipe", "paper"))
    }
    return [found[row["id"]] for row in ledger.rows() if row["id"] in found]
