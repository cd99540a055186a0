"""Which version of the numerics a run is made with: the units of numerics.yaml that it uses.

A unit is a part of the code that can change a result, such as one architecture; its version is raised only
when its results change. A run's identity holds these versions, never files or digests of files.
"""

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mscs.errors import UsageError
from mscs.settings import EMBEDDING_LOSSES, Phase

FILE = Path("numerics.yaml")
PACKAGES = "packages"
"""The unit of the installed packages, which has accepted versions instead of a digest."""


def load_numerics(path: Path = FILE) -> dict[str, Any]:
    """Return numerics.yaml as it stands; UsageError where it is missing or broken."""
    try:
        document = yaml.safe_load(path.read_text())
        if isinstance(document["units"], dict):
            return document
        reason = "units is no mapping"
    except FileNotFoundError:
        raise UsageError(f"{path} not found in {Path.cwd()}; run from the project's root folder") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
    raise UsageError(f"{path} cannot be used ({reason}); take it from git again: git checkout {path}")


def units_of(settings: Mapping[str, Any]) -> dict[Phase, list[str]]:
    """Return the units that a run uses, by phase (`train`, `evaluate`).

    Args:
        settings: a flat mapping, as `mscs show RUN --json` prints it; `dataset`, `model` and the switches of
            the losses on embeddings are read, each of which is a unit of its name.
    """
    network = ["data", settings["dataset"], "transforms", "networks", settings["model"]]
    losses = [name for name in EMBEDDING_LOSSES if settings.get(name)]
    return {
        "train": [*network, "cross_entropy", *losses, "optimizer", "training", PACKAGES],
        "evaluate": [*network, "inference", "metrics", PACKAGES],
    }


def versions(
    settings: Mapping[str, Any], phase: Phase, numerics: Mapping[str, Any] | None = None
) -> dict[str, int]:
    """Return the version of every unit that `phase` ("train" or "evaluate") of a run uses.

    Raises UsageError where numerics.yaml lacks a unit, as after adding an architecture.
    """
    units = (numerics or load_numerics())["units"]
    used = units_of(settings)[phase]
    missing = [name for name in used if name not in units]
    if missing:
        raise UsageError(
            f"{FILE} has no unit {missing[0]!r}, which run {settings.get('run')} uses; "
            "list it there under units and under files"
        )
    return {name: units[name]["version"] for name in used}


def installed_packages(names: Mapping[str, Any]) -> dict[str, str | None]:
    """Return installed versions without their build's suffix (2.14.1+cpu is 2.14.1), None where missing."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def check_packages(accept: bool, numerics: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Compare the installed packages with those that were last accepted.

    Returns both, by package, for the record of a run. Raises UsageError where they differ, unless `accept`.
    """
    accepted = (numerics or load_numerics())["units"][PACKAGES]["accepted"]
    installed = installed_packages(accepted)
    unknown = [name for name in accepted if installed[name] not in accepted[name]]
    if unknown and not accept:
        found = ", ".join(
            f"{name} {installed[name] or 'not installed'} (accepted: {', '.join(accepted[name])})"
            for name in unknown
        )
        raise UsageError(
            f"these packages can change results and were never accepted: {found}. Install the accepted "
            "versions (make setup), use --accept-packages for this run alone, or accept them for all with "
            "`python -m reproduce accept packages`"
        )
    return {"installed": installed, "accepted": dict(accepted)}
