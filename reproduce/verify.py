"""Does it reproduce? Every cell and every claimed direction against the paper, by a rule written down here.

A cell is reproduced when our value lies within the dataset's tolerance of the published one (see
`mscs.datasets.spec.Spec`), or within two standard errors of our own seeds where those are wider. A
direction holds when its gap has the paper's sign, and is certain when it also exceeds twice the standard
error of the difference of the two means; with a single seed nothing is certain. A cell whose published value
is no measurement of the paper's own (`judged: false` in paper.yaml) is shown and not judged. In profile mini
no direction is judged, in profile small no value: their cells say what ran.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mscs.results import write_json, write_text
from reproduce.cells import Cell, cells
from reproduce.rendering import markdown_page, markdown_table
from reproduce.tables import Results, directions, standard_error


@dataclass(frozen=True)
class Outcome:
    """What `verify` found, as data and as text; exit code 0 when nothing contradicts the paper."""

    path: Path
    document: dict[str, Any]
    markdown: str
    exit_code: int

    def write(self) -> None:
        """Write verify.json and verify.md."""
        write_json(self.path.with_suffix(".json"), self.document)
        write_text(self.path.with_suffix(".md"), self.markdown)


def verify(results: Results) -> Outcome:
    """Compare all cells and claims of one profile with the paper."""
    cell_rows = [_cell_row(results, cell) for cell in cells() if cell.run is not None]
    claim_rows = [
        {"table": one.claim.table, **vars(one), "claim": one.claim.text} for one in directions(results)
    ]
    statuses = {row["status"] for row in [*cell_rows, *claim_rows]}
    failed = results.comparable and not statuses.isdisjoint({"not reproduced", "contradicted"})
    facts = {"profile": results.profile, "stamp": results.stamp}
    document = {**facts, "claims": claim_rows, "cells": cell_rows}
    gaps = [
        [
            row["table"],
            row["claim"],
            _shown(row["gap"], "{:+.2f}") + _shown(row["error"], " ± {:.2f}"),
            row["status"],
        ]
        for row in claim_rows
    ]
    values = [
        [
            *(row[key] for key in ("table", "row", "column")),
            "-" if row["paper"] is None else row["paper"],
            _shown(row["ours"], "{:.1f}"),
            _shown(row["difference"], "{:+.1f}"),
            row["status"],
        ]
        for row in cell_rows
    ]
    page = markdown_page(
        "# Verification",
        f"*{results.stamp}*",
        markdown_table(["table", "claim", "gap", "status"], gaps),
        markdown_table(["table", "row", "column", "paper", "ours", "difference", "status"], values),
    )
    return Outcome(results.root / "verify", document, page, int(failed))


def _cell_row(results: Results, cell: Cell) -> dict[str, Any]:
    filled = results.fill(cell)
    status = {"off": "not reproduced", "not measured": "not run"}.get(filled.status, filled.status)
    error = standard_error(filled.ours)
    if status == "not reproduced" and error is not None and abs(filled.difference or 0) <= 2 * error:
        status = "reproduced"
    return {
        "table": cell.table,
        "row": cell.row,
        "column": cell.column,
        "paper": cell.paper,
        "ours": filled.ours.number,
        "difference": filled.difference if results.comparable else None,
        "std": filled.ours.std,
        "n": filled.ours.n,
        "status": status,
    }


def _shown(value: float | str | None, form: str) -> str:
    return form.format(value) if isinstance(value, float) else value or ""
