"""Which version of the numerics a run is made with: the units of numerics.yaml that it uses.

A unit is a part of the code that can change a result, such as one architecture; its version is raised only
when its results change. A run's identity holds these versions, never files or digests of files.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mscs.errors import UsageError
from mscs.modules import own_digest
from mscs.provenance import package_versions
from mscs.results import read_yaml
from mscs.settings import EMBEDDING_LOSSES, Phase

FILE = Path("numerics.yaml")
PACKAGES = "packages"
"""The unit of the installed packages, which has accepted versions instead of a digest."""


def load_numerics(path: Path = FILE) -> dict[str, Any]:
    """Return numerics.yaml as it stands; UsageError where it is missing or broken."""
    remedy = f"take it from git again: git checkout {path}"
    document = read_yaml(path, remedy)
    if not isinstance(document, dict) or not isinstance(document.get("units"), dict):
        raise UsageError(f"{path} has no mapping of units; {remedy}")
    return document


def units_of(settings: Mapping[str, Any]) -> dict[Phase, list[str]]:
    """Return the units that a run uses, by phase (`train`, `evaluate`).

    Args:
        settings: a flat mapping, as `mscs show RUN --json` prints it; `dataset`, `model` and the switches of
            the losses on embeddings are read, each of which is a unit of its name. Code of the user's own
            has its import path for a unit, a dataset in folders is read by the unit `folders`.
    """
    dataset = "folders" if settings.get("folders") else settings.get("spec") or settings["dataset"]
    network = ["data", dataset, "transforms", "networks", settings["model"]]
    switched_on = {name: settings[name] for name in EMBEDDING_LOSSES if settings.get(name)}
    losses = [name if value is True else value for name, value in switched_on.items()]
    return {
        "train": [*network, "cross_entropy", *losses, "optimizer", "training", PACKAGES],
        "evaluate": [*network, "inference", "metrics", PACKAGES],
    }


def own_paths(settings: Mapping[str, Any]) -> set[str]:
    """Return the import paths that a run with these flat values names."""
    return {unit for unit in units_of(settings)["train"] if ":" in unit}


def versions(settings: Mapping[str, Any], phase: Phase, numerics: Mapping[str, Any]) -> dict[str, int | str]:
    """Return the version of every unit that `phase` ("train" or "evaluate") of a run uses.

    The version of the user's own code is its digest: nobody raises one. Raises UsageError where numerics.yaml
    lacks a unit, as after adding an architecture.
    """
    units, used = numerics["units"], units_of(settings)[phase]
    for name in used:
        if name not in units and ":" not in name:
            raise UsageError(
                f"{FILE} has no unit {name!r}, which run {settings.get('run')} uses; "
                "list it there under units and under files"
            )
    return {name: own_digest(name) if ":" in name else units[name]["version"] for name in used}


def installed_packages(names: Iterable[str]) -> dict[str, str | None]:
    """Return installed versions without their build's suffix (2.14.1+cpu is 2.14.1), None where missing."""
    found = package_versions(names)
    return {name: version and version.partition("+")[0] for name, version in found.items()}


def check_packages(accept: bool, numerics: Mapping[str, Any] | None = None) -> dict[str, str | None]:
    """Return the installed versions of the packages that count.

    Raises UsageError where they are not those last accepted, unless `accept`.
    """
    accepted = (numerics or load_numerics())["units"][PACKAGES]["accepted"]
    installed = installed_packages(accepted)
    found = ", ".join(
        f"{name} {version or 'not installed'} (accepted: {', '.join(accepted[name])})"
        for name, version in installed.items()
        if version not in accepted[name]
    )
    if found and not accept:
        raise UsageError(
            f"these packages can change results and were never accepted: {found}. Install the accepted "
            "versions (make setup), use --accept-packages for this run alone, or accept them for all with "
            "`python -m reproduce accept packages`"
        )
    return installed
