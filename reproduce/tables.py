"""Result files -> the paper's tables with its values beside ours: Markdown, CSV, LaTeX, JSON."""

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mscs.params import Params, load_params
from mscs.results import read_json, write_json, write_text
from reproduce.cells import Cell, Claim, claims, row_cells, table_block

RESULTS = Path("results")
MINI_STAMP = "profile mini: generated data, tiny networks, not comparable with the paper"
PAPER_STAMP = "profile paper"
TOLERANCES = {"cityscapes": 0.6, "ade20k": 1.0, "pascal_context": 0.7, "cadis": 1.0}
"""How far a retrained mIoU may lie from the published one, in points, from spreads that others report
over seeds (Cityscapes 0.1-0.6, ADE20K up to 1, see docs/fidelity.md)."""
PARAMETER_TOLERANCE = 1.0
COMPARABLE = ("reproduced", "off", "cited, not judged", "not judged")
"""Statuses of cells whose difference to the paper's value is shown."""


@dataclass(frozen=True)
class Value:
    """Our side of one cell: a number with its spread over seeds, "OOM", or nothing yet."""

    number: float | str | None
    std: float | None = None
    n: int = 0


@dataclass(frozen=True)
class Filled:
    """A cell with our value, the difference to the paper's and what that means."""

    cell: Cell
    ours: Value
    difference: float | None
    status: str


class Results:
    """Results of one profile, read when asked for; a missing file is an empty value."""

    def __init__(self, profile: str, root: Path = RESULTS):
        self.profile = profile
        self.root = root / profile

    @property
    def stamp(self) -> str:
        """What every table and figure of the profile says of itself."""
        return MINI_STAMP if self.profile == "mini" else PAPER_STAMP

    def evaluation(self, run: str) -> dict[str, Any] | None:
        """Return a run's evaluation.json, or None where it has not been run."""
        path = self.root / "runs" / run / "evaluation.json"
        return read_json(path) if path.exists() else None

    def score(self, run: str, mode: str) -> Value:
        """Return a run's mIoU in percent, with standard deviation and number of seeds."""
        record = (self.evaluation(run) or {}).get(mode)
        return Value(record["miou"], record["std"], record["n"]) if record else Value(None)

    def value(self, cell: Cell) -> Value:
        """Return our value of a cell."""
        if cell.run is None:
            return Value(None)
        if cell.read == "parameters":
            return Value(parameter_count(load_params(), cell.run) / 1e6, None, 1)
        if cell.read == "memory":
            path = self.root / "memory.json"
            found = read_json(path).get("runs", {}).get(cell.run) if path.exists() else None
            return Value(found["dense_gb"] if found else None, None, 1)
        ours = self.score(cell.run, cell.read)
        if cell.over is None or not isinstance(ours.number, float):
            return ours
        base = self.score(cell.over, cell.read)
        if not isinstance(base.number, float):
            return Value(None)
        return Value(ours.number - base.number, None, min(ours.n, base.n))

    def fill(self, cell: Cell) -> Filled:
        """Return a cell with our value and its status."""
        ours = self.value(cell)
        difference = None
        if isinstance(ours.number, float) and isinstance(cell.paper, int | float):
            difference = ours.number - cell.paper
        return Filled(cell, ours, difference, self._status(cell, ours, difference))

    def _status(self, cell: Cell, ours: Value, difference: float | None) -> str:
        if cell.run is None:
            return "cited"
        if ours.number is None:
            return "not measured" if cell.read == "memory" else "not run"
        if ours.number == "OOM":
            return "out of memory" if cell.paper == "OOM" else "off"
        if cell.read == "parameters":
            close = difference is not None and abs(difference) < PARAMETER_TOLERANCE
            return ("same count" if self.profile == "mini" else "reproduced") if close else "off"
        if self.profile == "mini":
            return "ran (mini)"
        if cell.read == "memory":
            return "measured"
        if difference is None:
            return "no published value"
        if not cell.judged:
            return "cited, not judged" if "cited" in cell.source else "not judged"
        return "reproduced" if abs(difference) <= TOLERANCES[cell.run.split("-")[0]] else "off"

    def claim(self, claim: Claim) -> tuple[float | None, str]:
        """Return the measured gap of a claimed direction, and whether it holds."""
        better, worse = self.score(claim.better, claim.read), self.score(claim.worse, claim.read)
        if not (isinstance(better.number, float) and isinstance(worse.number, float)):
            return None, "not run"
        gap = better.number - worse.number
        return gap, "as in the paper" if gap > 0 else "the other way round"


def parameter_count(params: Params, run: str) -> int:
    """Return the number of parameters of a run's full-size network, counted without allocating weights."""
    import torch

    from mscs.datasets import label_set
    from mscs.models import build_model, count_parameters

    settings = params.resolve(run, "paper").settings
    with torch.device("meta"):
        model = build_model(
            settings.model,
            settings.backbone,
            label_set(settings.dataset, settings.task).num_classes,
            projector=settings.projector,
            **settings.model_options,
        )
    return count_parameters(model)


def write_table(table: str, results: Results) -> None:
    """Write one table in all formats into results/<profile>/tables."""
    block = table_block(table)
    grid = [header(block), *body(table, results)]
    folder = results.root / "tables"
    title = f"Table {table[0]}({table[1]})" if len(table) > 1 else f"Table {table}"
    title = f"{title}. {block['title']}"
    directions = [(claim.text, *results.claim(claim)) for claim in claims(table)]
    write_text(folder / f"{table}.csv", as_csv(grid))
    write_text(folder / f"{table}.md", as_markdown(title, grid, directions, notes(table), results.stamp))
    write_text(folder / f"{table}.tex", as_latex(title, grid, results.stamp))
    write_json(folder / f"{table}.json", as_metrics(table, results, directions))


def header(block: Any) -> list[str]:
    """Return the column names: the paper's row labels, then paper, ours, difference, status per value."""
    values = []
    for column in block["columns"].values():
        values += [f"{column} paper", "ours", "difference", "status"]
    return [*block["header"], *values]


def body(table: str, results: Results) -> list[list[str]]:
    """Return the rows of a table as text."""
    block = table_block(table)
    rows = []
    for row in block["rows"]:
        cells = dict(row_cells(table, row))
        texts = [str(part) for part in row["row"]]
        for key in block["columns"]:
            texts += filled_texts(results.fill(cells[key])) if key in cells else ["", "", "", ""]
        rows.append(texts)
    return rows


def filled_texts(filled: Filled) -> list[str]:
    """Return paper, ours, difference and status of one cell as text."""
    cell, ours = filled.cell, filled.ours
    paper = "-" if cell.paper is None else str(cell.paper)
    paper += " [cited]" if "cited" in cell.source else ""
    shown = "" if ours.number is None else str(ours.number)
    if isinstance(ours.number, float):
        shown = f"{ours.number:.1f}" + (f" ± {ours.std:.1f} (n={ours.n})" if ours.std is not None else "")
    comparable = filled.difference is not None and filled.status in COMPARABLE
    return [paper, shown, f"{filled.difference:+.1f}" if comparable else "", filled.status]


def notes(table: str) -> list[str]:
    """Return what a reader must know about a table and its single cells."""
    found = list(table_block(table).get("notes", ()))
    for row in table_block(table)["rows"]:
        for _, cell in row_cells(table, row):
            if cell.note:
                found.append(f"{cell.row}, {cell.column}: {cell.note}.")
    return found


def as_metrics(
    table: str, results: Results, directions: list[tuple[str, float | None, str]]
) -> dict[str, Any]:
    """Return our values by row and column, for `dvc metrics diff`."""
    metrics: dict[str, Any] = {}
    for row in table_block(table)["rows"]:
        for key, cell in row_cells(table, row):
            number = results.value(cell).number
            if number is not None:
                metrics.setdefault(cell.row, {})[key] = number
    gaps = {text: gap for text, gap, _ in directions if gap is not None}
    return {**metrics, "directions": gaps} if gaps else metrics


def as_csv(grid: list[list[str]]) -> str:
    """Return a table as CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows(grid)
    return stream.getvalue()


def as_markdown(
    title: str,
    grid: list[list[str]],
    directions: list[tuple[str, float | None, str]],
    remarks: list[str],
    stamp: str,
) -> str:
    """Return a table as Markdown, with its stamp, the claimed directions and notes."""
    rows = [[text.replace("|", "\\|") for text in row] for row in grid]
    lines = [
        f"### {title}",
        "",
        f"*{stamp}*",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|---" * len(rows[0]) + "|",
    ]
    lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    if directions:
        lines += ["", "Directions that the paper reports:", ""]
        for text, gap, verdict in directions:
            lines.append(f"- {text}: {verdict}" + (f" ({gap:+.1f})" if gap is not None else ""))
    if remarks:
        lines += ["", "Notes:", "", *(f"- {remark}" for remark in remarks)]
    return "\n".join(lines) + "\n"


def as_latex(title: str, grid: list[list[str]], stamp: str) -> str:
    """Return a table as a LaTeX table environment (package booktabs)."""
    escapes = str.maketrans(
        {"%": r"\%", "#": r"\#", "_": r"\_", "&": r"\&", "~": r"$\sim$", "±": r"$\pm$", "†": r"$^\dagger$"}
    )
    rows = [" & ".join(text.translate(escapes) for text in row) + r" \\" for row in grid]
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{title.translate(escapes)} ({stamp.translate(escapes)})}}",
            rf"\begin{{tabular}}{{{'l' * len(grid[0])}}}",
            r"\toprule",
            rows[0],
            r"\midrule",
            *rows[1:],
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
