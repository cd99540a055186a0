"""What changed between two commits: params, the runs they touch, the cells that moved, and what stayed.

A revision is anything git knows (commit, branch, tag), the name of a DVC experiment, or "." for the working
tree. Only params.yaml, numerics.yaml and the small result files are read, so a clone without data is enough.
"""

import io
import json
import subprocess
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mscs.errors import UsageError
from mscs.numerics import FILE as NUMERICS
from mscs.params import Params
from mscs.paths import RESULTS, resolve_all
from reproduce.cells import Cell, cells
from reproduce.rendering import markdown_page, markdown_table, render
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
    commit = resolve_commit(name)
    read = ("params.yaml", str(NUMERICS), str(RESULTS))
    listed = _git("ls-tree", "-r", "--name-only", "-z", commit, "--", *read)
    wanted = [path for path in listed.stdout.decode().split("\0") if path.endswith((".json", ".yaml"))]
    with tempfile.TemporaryDirectory(prefix="mscs-compare-") as folder:
        if wanted:
            archive = _git("archive", "--format=zip", commit, "--", *wanted).stdout
            zipfile.ZipFile(io.BytesIO(archive)).extractall(folder)
        yield Revision(name, commit, Path(folder))


def resolve_commit(name: str) -> str:
    """Return the commit of a revision or of a DVC experiment, which is a git reference of its own."""
    if _git("rev-parse", "--git-dir").returncode:
        raise UsageError(f"{Path.cwd()} is not in a git repository, which holds the revisions to compare")
    found = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}").stdout.decode()
    if not found:
        found = _git("for-each-ref", "--format=%(objectname)", f"refs/exps/*/*/{name}").stdout.decode()
    if not found:
        raise UsageError(
            f"unknown revision {name!r}; accepted: a commit, branch, tag or DVC experiment (see `git log`, "
            "`dvc exp show`), or . for the working tree"
        )
    return found.split()[0]


def compare(first: Revision, second: Revision, profile: str | None = None) -> dict[str, Any]:
    """Return all that differs between two revisions, and what does not, as plain data."""
    edits = differences(first.params(), second.params())
    profile = profile or second.params()["profile"]
    (before, remark), (after, other) = first.settings(profile), second.settings(profile)
    old, new = _named(before), _named(after)
    touched = {name: keys for name in {**old, **new} if (keys := _setting_edits(name, old, new))}
    results = first.results(profile), second.results(profile)
    rows = [_cell_row(cell, *results) for cell in cells() if cell.run is not None]
    return {
        "profile": profile,
        "first": {"name": first.name, "commit": first.commit},
        "second": {"name": second.name, "commit": second.commit},
        "remarks": [text for text in (remark, other) if text],
        "params": edits,
        "runs": {name: keys | _scores(name, *results) for name, keys in touched.items()},
        "untouched_runs": sorted(name for name in after["runs"] if name not in touched),
        "data": [name for name in after["datasets"] if _digest(name, *results)],
        "moved": [row for row in rows if row["verdict"] not in ("unchanged", "not run")],
        "unchanged": [row for row in rows if row["verdict"] == "unchanged"],
        "not_run": sum(row["verdict"] == "not run" for row in rows),
    }


def differences(first: Any, second: Any, prefix: str = "") -> dict[str, list[Any]]:
    """Return {dotted key: [first, second]} of the leaves in which two mappings differ; None is absent."""
    if not (isinstance(first, Mapping) and isinstance(second, Mapping)):
        return {} if first == second else {prefix: [first, second]}
    found: dict[str, list[Any]] = {}
    for key in {**first, **second}:
        found |= differences(first.get(key), second.get(key), f"{prefix}.{key}" if prefix else str(key))
    return found


def _named(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a resolved.json by the name of a dataset or run."""
    return {**resolved.get("datasets", {}), **resolved.get("runs", {})}


def _setting_edits(name: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    edits = differences(before.get(name, {}), after.get(name, {}))
    # a setting of both phases is listed in both
    plain = {
        key.partition(".")[2] if "info" in after.get(name, {}) else key: pair for key, pair in edits.items()
    }
    status = "new" if name not in before else "gone" if name not in after else "changed"
    return {"status": status, "settings": plain if status == "changed" else {}} if edits else {}


def _scores(run: str, first: Results, second: Results) -> dict[str, Any]:
    found = {}
    for mode in ("ss", "ms"):
        pair = [results.score(run, mode).number for results in (first, second)]
        if pair != [None, None]:
            found[mode] = pair
    return {"scores": found}


def _digest(dataset: str, *results: Results) -> bool:
    """Return whether a dataset's files differ, as far as both sides know."""
    first, second = (one.read(f"data/{dataset}.json").get("digest") for one in results)
    return None not in (first, second) and first != second


def _cell_row(cell: Cell, first: Results, second: Results) -> dict[str, Any]:
    before, after = _value(first, cell), _value(second, cell)
    row: dict[str, Any] = {"table": cell.table, "row": cell.row, "column": cell.column, "run": cell.run}
    row |= {"first": before, "second": after, "difference": None, "error": None}
    if before == after:
        return {**row, "verdict": "not run" if after is None else "unchanged"}
    if not (isinstance(before, float) and isinstance(after, float)):
        return {**row, "verdict": "new" if before is None else "gone" if after is None else "changed"}
    row["difference"] = after - before
    if cell.read not in ("ss", "ms"):
        return {**row, "verdict": "changed"}
    row["error"] = error = cell_error(cell, first, second)
    if error is None:
        return {**row, "verdict": "moved; seed noise unknown, too few seeds"}
    beyond = abs(after - before) > 2 * error
    return {**row, "verdict": "moved beyond seed noise" if beyond else "within seed noise"}


def _value(results: Results, cell: Cell) -> float | str | None:
    if cell.read != "parameters":
        return results.value(cell).number
    # counted when the tables were written: another revision's networks cannot be built here
    return results.read(f"tables/{cell.table}.json").get(cell.row, {}).get("parameters")


def cell_error(cell: Cell, *results: Results) -> float | None:
    """Return the standard error of the difference of a cell between results, None without enough seeds."""
    runs = [run for run in (cell.run, cell.over) if run is not None]
    return standard_error(*(one.score(run, cell.read) for one in results for run in runs))


def sections(document: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Yield (title, header, rows) of what a person reads."""
    a, b = document["first"]["name"], document["second"]["name"]
    edits = [[key, *map(_show, pair)] for key, pair in document["params"].items()]
    yield "Changed parameters (params.yaml)", ["key", a, b], edits
    runs = []
    for run, facts in document["runs"].items():
        changes = [f"{key}: {_show(old)} → {_show(new)}" for key, (old, new) in facts["settings"].items()]
        scores = [f"{mode} {_show(old)} → {_show(new)}" for mode, (old, new) in facts["scores"].items()]
        runs.append([run, "; ".join(changes) or facts["status"], "; ".join(scores)])
    yield "Touched runs and data settings", ["run", "settings", "mIoU"], runs
    yield "Changed data files", ["dataset"], [[name] for name in document["data"]]
    header = ["table", "row", "column", a, b, "difference", "verdict"]
    for title, key in (("Moved cells", "moved"), ("Unchanged cells", "unchanged")):
        yield title, header, [_cell_texts(row) for row in document[key]]
    yield "Untouched runs", ["run"], [[run] for run in document["untouched_runs"]]


def _cell_texts(row: Mapping[str, Any]) -> list[str]:
    difference = "" if row["difference"] is None else f"{row['difference']:+.2f}"
    difference += f" ± {row['error']:.2f}" if row["error"] is not None else ""
    shown = [_show(row["first"]), _show(row["second"])]
    return [row["table"], row["row"], row["column"], *shown, difference, row["verdict"]]


def _show(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:.4g}" if isinstance(value, float) else json.dumps(value)


def as_text(document: Mapping[str, Any]) -> str:
    """Return the comparison for a terminal, in Markdown."""
    a, b = document["first"], document["second"]
    blocks = [f"{a['name']} -> {b['name']}, profile {document['profile']}", *document["remarks"]]
    for title, header, rows in sections(document):
        shown = [] if title == "Untouched runs" else rows
        blocks += [f"{title}: {len(rows)}", markdown_table(header, shown, aligned=True)]
    return markdown_page(*blocks, f"Cells without a result on either side: {document['not_run']}").rstrip()


def as_html(document: Mapping[str, Any]) -> str:
    """Return the comparison as one self-contained page."""
    title = f"{document['first']['name']} → {document['second']['name']}"
    return render("compare.html.j2", {**document, "title": title, "sections": list(sections(document))})


def _git(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(["git", *arguments], capture_output=True, check=False)
