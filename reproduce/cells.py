"""What the paper shows: every cell of Tables 1 to 3, what it prints and which run fills it; the figures."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from mscs.errors import UsageError, unknown_name

TABLES = ("1a", "1b", "2a", "2b", "3")
TSNE_RUNS = ("cityscapes-upernet-r101-ce", "cityscapes-upernet-r101-ours")
"""What Fig. 1 shows."""
FIGURE_RUNS = {
    "fig2": ("ade20k-upernet-swins-ce", "ade20k-upernet-swins-ours"),
    "fig3": ("cityscapes-hrnet-hr48-ce", "cityscapes-hrnet-hr48-ours"),
    "fig4": ("cadis-ocrnet-r50-ce", "cadis-ocrnet-r50-ours"),
}
"""The pair of runs that each of the other figures shows."""

Read = Literal["ss", "ms", "memory", "parameters"]


@dataclass(frozen=True)
class Cell:
    """One published value and how ours comes about.

    `paper` is a number, "OOM", or None where the source is blank or damaged; `over` names the baseline run
    of an improvement; a cell without a run is only cited. `judged` is false where the published value is no
    measurement of the paper's own, so that ours need not agree with it.
    """

    table: str
    row: str
    column: str
    paper: float | str | None
    source: str
    run: str | None = None
    over: str | None = None
    read: Read = "ss"
    note: str | None = None
    judged: bool = True


@dataclass(frozen=True)
class Claim:
    """A direction the paper reports: one run scores better than another."""

    table: str
    text: str
    better: str
    worse: str
    read: Read


@cache
def paper() -> Mapping[str, Any]:
    """Return reproduce/paper.yaml."""
    text = Path(__file__).with_name("paper.yaml").read_text()
    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


def table_block(table: str) -> Mapping[str, Any]:
    """Return the block of one table; an unknown name is a UsageError."""
    if table not in paper():
        raise UsageError(unknown_name("table", table, paper()))
    return paper()[table]


def row_label(row: Mapping[str, Any]) -> str:
    """Return a row's name: its header cells in one line."""
    return " / ".join(str(part) for part in row["row"])


def row_cells(table: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Cell]]:
    """Yield (column key, cell) for the filled cells of a row."""
    block = table_block(table)
    for key, column in block["columns"].items():
        if key in row:
            cell = dict(row[key])
            source = cell.pop("source", block["origin"])
            yield key, Cell(table, row_label(row), column, source=source, **cell)


def cells(*tables: str) -> Iterator[Cell]:
    """Yield the cells of some tables, or of all."""
    for table in tables or TABLES:
        for row in table_block(table)["rows"]:
            for _, cell in row_cells(table, row):
                yield cell


def claims(*tables: str) -> Iterator[Claim]:
    """Yield the directions that some tables, or all, claim."""
    for table in tables or TABLES:
        for claim in table_block(table).get("claims", ()):
            yield Claim(table, claim["text"], claim["better"], claim["worse"], claim["read"])


def table_runs(table: str) -> list[str]:
    """Return the runs whose results a table needs, in order of appearance."""
    named = [run for cell in cells(table) for run in (cell.run, cell.over) if run]
    named += [run for claim in claims(table) for run in (claim.better, claim.worse)]
    return list(dict.fromkeys(named))
