"""Does it reproduce? Every cell and every claimed direction against the paper, by a rule written down here.

A cell is reproduced when our value lies within the dataset's tolerance of the published one (see
`reproduce.tables.TOLERANCES`), or within two standard errors of our own seeds where those are wider. A
direction holds when its gap has the paper's sign, and is certain when it also exceeds twice the standard
error of the difference of the two means; with a single seed nothing is certain. A cell whose published value
is no measurement of the paper's own (`judged: false` in paper.yaml) is shown and not judged. In profile mini
no direction is judged: its cells say what ran.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduce.cells import Claim, cells, claims
from reproduce.rendering import markdown_page, markdown_table
from reproduce.tables import Results, Value


@dataclass(frozen=True)
class Outcome:
    """What `verify` found, as data and as text; exit code 0 when nothing contradicts the paper."""

    path: Path
    document: dict[str, Any]
    markdown: str
    exit_code: int


def verify(results: Results) -> Outcome:
    """Compare all cells and claims of one profile with the paper."""
    cell_rows = [_cell_row(results, cell) for cell in cells() if cell.run is not None]
    mini = results.profile == "mini"
    claim_rows = [] if mini else [_claim_row(results, claim) for claim in claims()]
    failed = not mini and (
        any(row["status"] == "not reproduced" for row in cell_rows)
        or any(row["status"] == "contradicted" for row in claim_rows)
    )
    facts = {"profile": results.profile, "stamp": results.stamp}
    document = {**facts, "claims": claim_rows, "cells": cell_rows}
    return Outcome(results.root / "verify", document, _markdown(results, cell_rows, claim_rows), int(failed))


def standard_error(value: Value) -> float | None:
    """Return the standard error of a mean over seeds; None for a single seed."""
    return value.std / math.sqrt(value.n) if value.std is not None and value.n > 1 else None


def _cell_row(results: Results, cell: Any) -> dict[str, Any]:
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
        "difference": None if results.profile == "mini" else filled.difference,
        "std": filled.ours.std,
        "n": filled.ours.n,
        "status": status,
    }


def _claim_row(results: Results, claim: Claim) -> dict[str, Any]:
    better, worse = results.score(claim.better, claim.read), results.score(claim.worse, claim.read)
    row: dict[str, Any] = {"table": claim.table, "claim": claim.text, "gap": None, "error": None}
    if not (isinstance(better.number, float) and isinstance(worse.number, float)):
        return {**row, "status": "not run"}
    gap = better.number - worse.number
    errors = (standard_error(better), standard_error(worse))
    error = math.hypot(*errors) if None not in errors else None  # type: ignore[arg-type]
    certain = error is not None and abs(gap) > 2 * error
    direction = "holds" if gap > 0 else "contradicted"
    status = direction if certain else f"{'same' if gap > 0 else 'opposite'} sign, not enough seeds"
    if error is not None and not certain:
        status = "within seed noise"
    return {**row, "gap": gap, "error": error, "n": min(better.n, worse.n), "status": status}


def _markdown(results: Results, cell_rows: list[dict[str, Any]], claim_rows: list[dict[str, Any]]) -> str:
    gaps = [
        [
            row["table"],
            row["claim"],
            ("" if row["gap"] is None else f"{row['gap']:+.2f}")
            + ("" if row["error"] is None else f" ± {row['error']:.2f}"),
            row["status"],
        ]
        for row in claim_rows
    ]
    values = [
        [
            *(row[key] for key in ("table", "row", "column")),
            "-" if row["paper"] is None else row["paper"],
            f"{row['ours']:.1f}" if isinstance(row["ours"], float) else row["ours"] or "",
            "" if row["difference"] is None else f"{row['difference']:+.1f}",
            row["status"],
        ]
        for row in cell_rows
    ]
    return markdown_page(
        "# Verification",
        f"*{results.stamp}*",
        markdown_table(["table", "claim", "gap", "status"], gaps),
        markdown_table(["table", "row", "column", "paper", "ours", "difference", "status"], values),
    )
