"""What numerics.yaml records of the code: digests of its units, and how a changed one is accepted.

A digest is a hash over a unit's syntax trees, see `mscs.modules`.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from mscs.errors import MscsError, UsageError, unknown_name
from mscs.modules import digest
from mscs.numerics import FILE, PACKAGES, installed_packages, load_numerics, units_of
from mscs.params import Params
from mscs.results import write_text
from reproduce import trees
from reproduce.revisions import checkout, git

SHOWN = 10


def accept_same(params: Params, units: Sequence[str], python: str | None = None) -> str:
    """Accept the present state of units if their short trainings agree with the accepted state.

    Returns what was done. `python` is an interpreter with the accepted packages, which `packages` needs.
    """
    numerics = load_numerics()
    states = {unit: _states(numerics, unit) for unit in units}
    changed = {unit: (old, new) for unit, (old, new) in states.items() if old != new}
    if not changed:
        return f"{', '.join(units)}: nothing to accept"
    here = trees.Tree(Path.cwd())
    runs = trees.cases(params, [run for run in params.runs if changed.keys() & _units(params, run)])
    found: trees.Found = {}
    if PACKAGES in changed:
        if python is None:
            raise UsageError(
                f"{PACKAGES} --same needs --python PATH, an interpreter that has the accepted packages: its "
                'trainings are compared with those of this one. Without one there is --changed "why"'
            )
        found |= trees.compare_trainings((trees.Tree(Path.cwd(), python), here), params, runs)
        old, new = changed[PACKAGES]
        changed[PACKAGES] = old, {k: [*old[k], *(v for v in new[k] if v not in old[k])] for k in new}
    digests = {unit: old for unit, (old, _) in changed.items() if unit != PACKAGES}
    if digests:
        with checkout(accepted_commit(digests)) as source:
            found |= trees.compare_trainings((trees.Tree(source), here), params, runs)
    named = ", ".join(changed)
    if found:
        raise MscsError(
            "\n".join(trees.described(place, *values) for place, values in list(found.items())[:SHOWN])
            + f"\n{named}: {len(found)} differences, nothing was accepted. If they are on purpose: "
            'python -m reproduce accept UNIT --changed "why", a commit for each unit'
        )
    for unit, (_, new) in changed.items():
        _write(numerics, unit, new)
    return f"{named}: {len(runs)} short trainings on the CPU gave the same results; accepted"


def _units(params: Params, run: str) -> set[str]:
    return {unit for units in units_of(params.resolve(run).values).values() for unit in units}


def accept_changed(params: Params, unit: str, why: str) -> str:
    """Raise a unit's version; return which runs of the present profile that makes stale, and their cost."""
    from reproduce import plan

    numerics = load_numerics()
    old, new = _states(numerics, unit)
    if old == new:
        return f"{unit}: nothing to accept"
    entry = numerics["units"][unit]
    entry |= {"version": entry["version"] + 1, "why": why}
    _write(numerics, unit, new)
    said = f"{unit} is at version {entry['version']}; in profile {params.profile}"
    uses = [run for run in params.runs if unit in _units(params, run)]
    retrained = [run for run in uses if unit in units_of(params.resolve(run).values)["train"]]
    if retrained:
        device = plan.device_name()
        settings = [params.resolve(run).settings for run in retrained]
        costs = plan.text(plan.document(plan.costs(settings, device), device, 1))
        return f"{said} {len(retrained)} runs are trained and evaluated again\n{costs}"
    return f"{said} these runs are evaluated again, none is trained again: {', '.join(uses)}"


def accepted_commit(accepted: Mapping[str, str]) -> str:
    """Return the newest commit whose code has the accepted digests of all these units."""
    with suppress(MscsError, KeyError):  # a commit older than numerics.yaml or a unit ends the search
        for commit in git("rev-list", "HEAD", "--", str(FILE), "mscs").decode().split():
            files = yaml.safe_load(_committed(commit, str(FILE)))["files"]
            read = partial(_committed, commit)
            if all(digest(files[unit], read) == wanted for unit, wanted in accepted.items()):
                return commit
    raise UsageError(
        f"no commit has the accepted digests of {', '.join(accepted)}: commit the state that was accepted, "
        'accept one unit after the other, or use python -m reproduce accept UNIT --changed "why"'
    )


def _committed(commit: str, path: str) -> str:
    return git("show", f"{commit}:./{path}").decode()


def _states(numerics: Mapping[str, Any], unit: str) -> tuple[Any, Any]:
    """Return the accepted and the present state of a unit: digests, or for `packages` lists of versions."""
    if unit not in numerics["units"]:
        raise UsageError(unknown_name("unit", unit, numerics["units"]))
    if unit != PACKAGES:
        return numerics["units"][unit]["digest"], digest(numerics["files"][unit])
    accepted = numerics["units"][unit]["accepted"]
    installed = installed_packages(accepted)
    missing = [name for name, version in installed.items() if version is None]
    if missing:
        raise UsageError(f"{missing[0]} is not installed, so there is nothing to accept; run make setup")
    known = all(installed[name] in accepted[name] for name in accepted)
    return accepted, accepted if known else {name: [version] for name, version in installed.items()}


def _write(numerics: Mapping[str, Any], unit: str, state: Any) -> None:
    """Replace a unit's line in numerics.yaml and nothing else, comments included."""
    entry = numerics["units"][unit] | {"accepted" if unit == PACKAGES else "digest": state}
    shown = yaml.safe_dump(entry, default_flow_style=True, sort_keys=False, allow_unicode=True, width=10**6)
    line = re.compile(rf"^  {unit}: \{{version.*$", re.MULTILINE)
    text, changes = line.subn(lambda _: f"  {unit}: {shown.strip()}", FILE.read_text())
    if changes != 1:
        raise MscsError(
            f"{FILE}: unit {unit!r} has {changes} lines `  {unit}: {{version: ...}}`, expected one"
        )
    write_text(FILE, text)
