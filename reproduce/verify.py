"""Does it reproduce? Every cell and every claimed direction against the paper, by a rule written down here.

A cell is reproduced when our value lies within the dataset's tolerance of the published one (see
`reproduce.tables.TOLERANCES`), or within two standard errors of our own seeds where those are wider. A
direction holds when its gap has the paper's sign, and is certain when it also exceeds twice the standard
error of the difference of the two means; with a single seed nothing is certain. A cell whose published value
is no measurement of the paper's own (`judged: false` in paper.yaml) is shown and not judged. Profile mini
reports directions only.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reproduce.cells import Claim, cells, claims
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
    claim_rows = [_claim_row(results, claim) for claim in claims()]
    mini = results.profile == "mini"
    failed = not mini and (
        any(row["status"] == "not reproduced" for row in cell_rows)
        or any(row["status"] == "contradicted" for row in claim_rows)
    )
    document = {"profile": results.profile, "stamp": results.stamp, "claims": claim_rows}
    if not mini:
        document["cells"] = cell_rows
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
        "difference": filled.difference,
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
    lines = [
        "# Verification",
        "",
        f"*{results.stamp}*",
        "",
        "| table | claim | gap | status |",
        "|---|---|---|---|",
    ]
    for row in claim_rows:
        gap = "" if row["gap"] is None else f"{row['gap']:+.2f}"
        gap += f" ± {row['error']:.2f}" if row["error"] is not None else ""
        lines.append(f"| {row['table']} | {row['claim']} | {gap} | {row['status']} |")
    if results.profile != "mini":
        lines += [
            "",
            "| table | row | column | paper | ours | difference | status |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in cell_rows:
            ours = f"{row['ours']:.1f}" if isinstance(row["ours"], float) else row["ours"] or ""
            paper = "-" if row["paper"] is None else row["paper"]
            gap = "" if row["difference"] is None else f"{row['difference']:+.1f}"
            texts = (row["table"], row["row"], row["column"], str(paper), ours, gap, row["status"])
            lines.append(f"| {' | '.join(texts)} |")
    return "\n".join(lines) + "\n"
