"""Result files -> the paper's tables with its values beside ours: Markdown, CSV, LaTeX, JSON."""

import itertools
import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mscs.datasets import DATASETS
from mscs.errors import MscsError
from mscs.params import Params, load_params
from mscs.paths import RESULTS
from mscs.results import join_seeds, read_json, write_json
from reproduce.cells import Cell, Claim, cells, claims, row_cells, table_block
from reproduce.records import Evaluation, Record, read_as
from reproduce.rendering import markdown_list, write_table_files

STAMPS = {
    "mini": "profile mini: generated data, tiny networks, not comparable with the paper",
    "small": "profile small: CamVid, EfficientNet-Lite0; comparable in direction, not in value",
}
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


@dataclass(frozen=True)
class Direction:
    """A claimed direction as measured: the gap in points, its standard error, seeds, and the verdict."""

    claim: Claim
    gap: float | None
    error: float | None
    n: int
    status: str


class Results:
    """Results of one profile, read when asked for; a missing file is an empty value."""

    def __init__(self, profile: str, root: Path = RESULTS):
        self.profile = profile
        self.root = root / profile

    @cached_property
    def params(self) -> Params:
        """The project's params.yaml."""
        return load_params()

    @property
    def stamp(self) -> str:
        """What every table and figure of the profile says of itself."""
        return STAMPS.get(self.profile, f"profile {self.profile}")

    @property
    def comparable(self) -> bool:
        """Whether values of the profile can be set against those of the paper."""
        return self.profile not in STAMPS

    def seed_files(self, run: str, name: str) -> list[Path]:
        """Return the files called `name` of a run's seeds, as far as they are there."""
        seeds = self.resolved.get("runs", {}).get(run, {}).get("info", {}).get("seeds")
        folders = (self.root / "runs" / run).glob("seed-*")
        found = {int(path.name[5:]): path / name for path in folders if re.fullmatch(r"seed-\d+", path.name)}
        return [found[n] for n in sorted(found) if found[n].exists() and (seeds is None or n in seeds)]

    def read(self, name: str) -> dict[str, Any]:
        """Return the content of a JSON file of the profile; empty where there is none."""
        path = self.root / name
        return read_json(path) if path.exists() else {}

    @cached_property
    def resolved(self) -> dict[str, Any]:
        """The settings of all runs."""
        return self.read("resolved.json")

    def evaluation(self, run: str) -> dict[str, Any] | None:
        """Return the scores of all seeds of a run in one record, or None where it has not been run."""
        records = [read_as(path, Evaluation) for path in self.seed_files(run, "evaluation.json")]
        trainings = [(record.get("digest"), record.get("numerics")) for record in records]
        if any(training != trainings[0] for training in trainings):
            raise MscsError(
                f"the seeds of {run} were trained under other settings or versions of the code: `python -m "
                f"reproduce run {run}` brings them up to date"
            )
        return join_seeds(records) if records else None

    def record(self, run: str) -> dict[str, Any]:
        """Return what a run was made with: its first seed's run.json, with the costs of all; may be empty."""
        records = [read_as(path, Record) for path in self.seed_files(run, "run.json")]
        if not records:
            return {}
        hours = [record["gpu_hours"] for record in records if record["gpu_hours"] is not None]
        return {
            **records[0],
            "seconds": sum(record["seconds"] for record in records),
            "gpu_hours": sum(hours) if hours else None,
            "peak_bytes": max(record["peak_bytes"] for record in records),
        }

    def score(self, run: str, mode: str) -> Value:
        """Return a run's mIoU in percent, with standard deviation and number of seeds."""
        record = (self.evaluation(run) or {}).get(mode)
        return Value(record["miou"], record["std"], record["n"]) if record else Value(None)

    def value(self, cell: Cell) -> Value:
        """Return our value of a cell."""
        if cell.run is None:
            return Value(None)
        if cell.read == "parameters":
            return Value(parameter_count(self.params, cell.run) / 1e6, None, 1)
        if cell.read == "memory":
            found = self.read("memory.json").get("runs", {}).get(cell.run)
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
            return ("reproduced" if self.comparable else "same count") if close else "off"
        if not self.comparable:
            return "ran"
        if cell.read == "memory":
            return "measured"
        if difference is None:
            return "no published value"
        if not cell.judged:
            return "cited, not judged" if "cited" in cell.source else "not judged"
        tolerance = DATASETS[self.params.run_info(cell.run)["dataset"]].tolerance
        return "reproduced" if tolerance is not None and abs(difference) <= tolerance else "off"

    def direction(self, claim: Claim) -> Direction:
        """Return what was measured of a claimed direction, judged by the rule of `reproduce.verify`."""
        better, worse = self.score(claim.better, claim.read), self.score(claim.worse, claim.read)
        if not (isinstance(better.number, float) and isinstance(worse.number, float)):
            return Direction(claim, None, None, 0, "not run")
        gap, error = better.number - worse.number, standard_error(better, worse)
        if error is None:
            status = f"{'same' if gap > 0 else 'opposite'} sign, not enough seeds"
        elif abs(gap) <= 2 * error:
            status = "within seed noise"
        else:
            status = "holds" if gap > 0 else "contradicted"
        return Direction(claim, gap, error, min(better.n, worse.n), status)


def standard_error(*values: Value) -> float | None:
    """Return the standard error of a difference of means over seeds (or of one); None for a single seed."""
    errors = [value.std / math.sqrt(value.n) for value in values if value.std is not None and value.n > 1]
    return math.hypot(*errors) if len(errors) == len(values) else None


def parameter_count(params: Params, run: str) -> int:
    """Return the number of parameters of a run's full-size network, counted without allocating weights."""
    import torch

    from mscs.build import network
    from mscs.models import count_parameters

    settings = params.resolve(run, "paper").settings
    with torch.device("meta"):
        return count_parameters(network(settings, settings.data.labels.num_classes, seed=None))


def label(table: str) -> str:
    """Return a table's name as the paper has it: 2a is Table 2(a)."""
    return f"Table {table[0]}" + (f"({table[1:]})" if len(table) > 1 else "")


def directions(results: Results, *tables: str) -> list[Direction]:
    """Return the directions that some tables, or all, claim, as measured; none in profile mini."""
    return [] if results.profile == "mini" else [results.direction(claim) for claim in claims(*tables)]


def write_table(table: str, results: Results) -> None:
    """Write one table in all formats into results/<profile>/tables."""
    block = table_block(table)
    path = results.root / "tables" / f"{table}.md"
    found = directions(results, table)
    judged = [
        f"{one.claim.text}: {one.status}" + ("" if one.gap is None else f" ({one.gap:+.1f})") for one in found
    ]
    write_table_files(
        path,
        f"{label(table)}. {block['title']}",
        results.stamp,
        header(block),
        body(table, results),
        markdown_list("Directions that the paper reports:", judged),
        markdown_list("Notes:", notes(table)),
    )
    write_json(path.with_suffix(".json"), as_metrics(table, results, found))


def header(block: Any) -> list[str]:
    """Return the column names: the paper's row labels, then paper, ours, difference, status per value."""
    columns = [[f"{name} paper", "ours", "difference", "status"] for name in block["columns"].values()]
    return [*block["header"], *itertools.chain(*columns)]


def body(table: str, results: Results) -> list[list[str]]:
    """Return the rows of a table as text."""
    block = table_block(table)
    rows = []
    for row in block["rows"]:
        filled = {key: filled_texts(results.fill(cell)) for key, cell in row_cells(table, row)}
        texts = [filled.get(key, ["", "", "", ""]) for key in block["columns"]]
        rows.append([*map(str, row["row"]), *itertools.chain(*texts)])
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
    of_cells = (f"{cell.row}, {cell.column}: {cell.note}." for cell in cells(table) if cell.note)
    return [*table_block(table).get("notes", ()), *of_cells]


def as_metrics(table: str, results: Results, found: list[Direction]) -> dict[str, Any]:
    """Return our values by row and column, for `dvc metrics diff`."""
    metrics: dict[str, Any] = {}
    for row in table_block(table)["rows"]:
        for key, cell in row_cells(table, row):
            number = results.value(cell).number
            if number is not None:
                metrics.setdefault(cell.row, {})[key] = number
    gaps = {one.claim.text: one.gap for one in found if one.gap is not None}
    return {**metrics, "directions": gaps} if gaps else metrics
