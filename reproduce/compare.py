"""What changed between two commits: params, the runs they touch, the cells that moved, and what stayed.

A revision is anything git knows (commit, branch, tag), the name of a DVC experiment, or "." for the working
tree. Only params.yaml and the small result files are read, so a clone without data is enough.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mscs.errors import UsageError
from mscs.params import Params
from mscs.paths import RESULTS, resolve_all
from mscs.results import read_json
from mscs.settings import fingerprint
from reproduce.cells import Cell, cells
from reproduce.rendering import markdown_page, markdown_table
from reproduce.revisions import checkout, differences, find_commit
from reproduce.tables import Results, standard_error

WORKING_TREE = "."


@dataclass(frozen=True)
class Revision:
    """A commit or the working tree (commit None); `folder` holds its params.yaml and result files."""

    name: str
    commit: str | None
    folder: Path

    def params(self) -> dict[str, Any]:
        """Return params.yaml as a mapping; UsageError where this revision has none."""
        path = self.folder / "params.yaml"
        if not path.exists():
            raise UsageError(f"revision {self.name!r} has no params.yaml; run from the project's root folder")
        return yaml.safe_load(path.read_text())

    def results(self, profile: str) -> Results:
        """Return the results of one profile."""
        return Results(profile, self.folder / RESULTS)

    def settings(self, profile: str) -> tuple[dict[str, Any], str | None]:
        """Return resolved settings by run and a remark, None if its results were made with just these.

        params.yaml is resolved by today's rules; where they do not fit it, its resolved.json has to do.
        """
        stored = self.results(profile).resolved
        try:
            current = resolve_all(Params(self.params(), str(self.folder / "params.yaml")), profile)
        except UsageError as error:
            if not stored:
                raise
            return stored, f"{self.name}: resolved.json is used, params.yaml is of another version ({error})"
        old, new, beside = _named(stored), _named(current), {"info": None}  # decides no result
        stale = [name for name in new if name in old and old[name] | beside != new[name] | beside]
        remark = f"{self.name}: params.yaml changed after its results: {', '.join(stale)}" if stale else None
        return current, remark


@contextmanager
def open_revision(name: str) -> Iterator[Revision]:
    """Give a revision with its files at hand; an unknown one is a UsageError."""
    if name == WORKING_TREE:
        yield Revision("working tree", None, Path())
        return
    commit = find_commit(name)
    with checkout(commit) as folder:
        yield Revision(name, commit, folder)


def compare(first: Revision, second: Revision, profile: str | None = None) -> dict[str, Any]:
    """Return all that differs between two revisions, and what does not, as plain data."""
    edits = differences(first.params(), second.params())
    profile = profile or second.params()["profile"]
    (before, remark), (after, other) = first.settings(profile), second.settings(profile)
    results = first.results(profile), second.results(profile)
    old, new = _named(before), _named(after)
    touched = {name for name in {**old, **new} if old.get(name) != new.get(name)}
    rows = [_cell_row(cell, *results, new) for cell in cells() if cell.run is not None]
    return {
        "profile": profile,
        "first": {"name": first.name, "commit": first.commit},
        "second": {"name": second.name, "commit": second.commit},
        "remarks": [text for text in (remark, other) if text],
        "params": edits,
        "runs": {
            name: _setting_edits(name, old, new) | _scores(name, *results)
            for name in {**old, **new}
            if name in touched
        },
        "untouched_runs": sorted(after["runs"].keys() - touched),
        "made_with": {run: found for run in after["runs"] if (found := _made_differently(run, *results))},
        "data": [name for name in after["datasets"] if _data_differ(name, *results)],
        "moved": [row for row in rows if row["verdict"] not in ("unchanged", "not run")],
        "unchanged": [row for row in rows if row["verdict"] == "unchanged"],
        "not_run": sum(row["verdict"] == "not run" for row in rows),
    }


def _named(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a resolved.json by the name of a dataset or run."""
    return {**resolved.get("datasets", {}), **resolved.get("runs", {})}


def _setting_edits(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    if not (name in before and name in after):
        return {"status": "gone" if name in before else "new", "settings": {}}
    edits = differences(before[name], after[name])
    if "info" in after[name]:  # a setting of both phases of a run is listed in both
        edits = {key.partition(".")[2]: pair for key, pair in edits.items()}
    return {"status": "changed", "settings": edits}


def _scores(run: str, *results: Results) -> dict[str, Any]:
    pairs = {mode: [one.score(run, mode).number for one in results] for mode in ("ss", "ms")}
    return {"scores": {mode: pair for mode, pair in pairs.items() if pair != [None, None]}}


def _made_differently(run: str, first: Results, second: Results) -> dict[str, Any]:
    """Return in what two trainings of a run differ by their records: code, packages, machine, data."""
    before, after = _made_with(run, first), _made_with(run, second)
    return differences(before, after) if before and after else {}


def _made_with(run: str, results: Results) -> dict[str, Any]:
    record = results.record(run)
    return record and {
        "settings": record.get("digest"),
        "code": record.get("settings", {}).get("numerics", {}).get("train"),
        "packages": record.get("packages"),
        "machine": {key: record.get("machine", {}).get(key) for key in ("cpu", "gpus", "cuda")},
        "data": record.get("data", {}).get("digest"),
    }


def _is_stale(run: str, results: Results, settings: Mapping[str, Any]) -> bool:
    """Return whether a run's scores were made under other settings or versions of the code."""
    by_phase = settings.get(run)
    if by_phase is None:
        return False
    for scored in map(read_json, results.seed_files(run, "evaluation.json")):
        for phase, made in (("train", scored), ("evaluate", scored.get("evaluation"))):
            now = fingerprint(by_phase[phase]), by_phase[phase]["numerics"]
            if made and "digest" in made and (made["digest"], made.get("numerics")) != now:
                return True
    return False


def _data_differ(dataset: str, *results: Results) -> bool:
    """Return whether a dataset's files differ, as far as both sides know."""
    first, second = (one.read(f"data/{dataset}.json").get("digest") for one in results)
    return None not in (first, second) and first != second


def _cell_row(cell: Cell, first: Results, second: Results, settings: Mapping[str, Any]) -> dict[str, Any]:
    results = first, second
    before, after = (_value(one, cell) for one in results)
    scored = cell.read in ("ss", "ms")
    runs = [run for run in (cell.run, cell.over) if run is not None]
    difference = after - before if isinstance(before, float) and isinstance(after, float) else None
    error = None
    if after is not None and scored and any(_is_stale(run, second, settings) for run in runs):
        verdict = "stale"  # its settings or the code's versions changed after it was made
    elif before == after:
        difference, verdict = None, "not run" if after is None else "unchanged"
    elif None in (before, after):
        verdict = "new" if before is None else "gone"
    elif difference is None or not scored:
        verdict = "changed"
    else:
        error = standard_error(*(one.score(run, cell.read) for one in results for run in runs))
        if error is None:
            verdict = "moved; seed noise unknown, too few seeds"
        else:
            verdict = "within seed noise" if abs(difference) <= 2 * error else "moved beyond seed noise"
    return {
        "table": cell.table,
        "row": cell.row,
        "column": cell.column,
        "run": cell.run,
        "first": before,
        "second": after,
        "difference": difference,
        "error": error,
        "verdict": verdict,
    }


def _value(results: Results, cell: Cell) -> float | str | None:
    if cell.read != "parameters":
        return results.value(cell).number
    # counted when the tables were written: another revision's networks cannot be built here
    return results.read(f"tables/{cell.table}.json").get(cell.row, {}).get("parameters")


def as_text(document: Mapping[str, Any]) -> str:
    """Return the comparison for a terminal, in Markdown."""
    a, b = document["first"]["name"], document["second"]["name"]
    edits = [[key, *map(_show, pair)] for key, pair in document["params"].items()]
    runs = []
    for run, facts in document["runs"].items():
        runs.append([run, _edits(facts["settings"]) or facts["status"], _edits(facts["scores"])])
    moved, unchanged = ([_cell_texts(row) for row in document[key]] for key in ("moved", "unchanged"))
    values = ["table", "row", "column", a, b, "difference", "verdict"]
    sections = {
        "Changed parameters (params.yaml)": (["key", a, b], edits),
        "Touched runs and data settings": (["run", "settings", "mIoU"], runs),
        "Trained with something else (first seed's run.json)": (
            ["run", "what differs"],
            [[run, _edits(found)] for run, found in document["made_with"].items()],
        ),
        "Changed data files": (["dataset"], [[name] for name in document["data"]]),
        "Moved cells": (values, moved),
        "Unchanged cells": (values, unchanged),
    }
    blocks = [f"{a} -> {b}, profile {document['profile']}", *document["remarks"]]
    for title, (header, rows) in sections.items():
        blocks += [f"{title}: {len(rows)}", markdown_table(header, rows, aligned=True)]
    blocks.append(f"Untouched runs: {len(document['untouched_runs'])}")
    return markdown_page(*blocks, f"Cells without a result on either side: {document['not_run']}").rstrip()


def _cell_texts(row: Mapping[str, Any]) -> list[str]:
    difference = "" if row["difference"] is None else f"{row['difference']:+.2f}"
    difference += f" ± {row['error']:.2f}" if row["error"] is not None else ""
    shown = [_show(row["first"]), _show(row["second"])]
    return [row["table"], row["row"], row["column"], *shown, difference, row["verdict"]]


def _edits(found: Mapping[str, Sequence[Any]]) -> str:
    return "; ".join(f"{key}: {_show(old)} → {_show(new)}" for key, (old, new) in found.items())


def _show(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)
