"""The rooms and the order of imports: a module may import from lower layers of its package, never upwards."""

import ast
import json
import re
from pathlib import Path

import pytest

LAYERS = [
    {
        "errors",
        "locks",
        "seeding",
        "distributed",
        "metrics",
        "results",
        "provenance",
        "blocks",
        "command_line",
        "model_options",
        "modules",
    },
    {"datasets", "transforms", "models", "losses", "optim"},
    {"settings", "loader", "checkpoint", "inference", "predictions"},
    {"numerics"},
    {"params"},
    {"paths"},
    {"memory"},
    {"build", "monitor", "doctor", "job"},
    {"train", "evaluation", "trackers"},
    {"runs"},
    {"launch"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: level for level, rooms in enumerate(LAYERS) for room in rooms}
CONFIGURATION_FREE = {"datasets", "transforms", "models", "losses", "metrics", "optim", "inference", "loader"}
CONFIGURATION = ("mscs.settings", "mscs.params", "mscs.blocks", "mscs.build", "yaml", "pydantic")


def imported_modules(path: Path) -> list[str]:
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def room_of(path: Path) -> str:
    return path.parts[1].removesuffix(".py")


SOURCES = sorted(p for p in Path("mscs").rglob("*.py") if p != Path("mscs/__init__.py"))


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path):
    room = room_of(path)
    assert room in LEVEL, f"{path}: a new room must be given a place in LAYERS"
    for name in imported_modules(path):
        assert not name.startswith("reproduce"), f"{path} imports {name}"
        parts = name.split(".")
        if parts[0] != "mscs" or len(parts) < 2 or parts[1] not in LEVEL:
            continue
        other = parts[1]
        if other == room:
            continue
        lower = LEVEL[other] < LEVEL[room]
        base_of_base = LEVEL[room] == 0 and other == "errors"
        assert lower or base_of_base, f"{path} imports {name}: upwards or sideways"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_losses_models_and_metrics_know_no_configuration(path):
    if room_of(path) in CONFIGURATION_FREE:
        assert not [n for n in imported_modules(path) if n.startswith(CONFIGURATION)]


def test_there_is_no_catch_all():
    assert not list(Path("mscs").rglob("utils*")) + list(Path("reproduce").rglob("utils*"))


def test_the_bill_of_materials_lists_the_pinned_packages():
    """`make sbom` was run after the last `make lock`; packages of other systems than Linux may be absent."""
    pattern = re.compile(r"^([\w.-]+)==([^\s;]+)( ;.*)?", re.MULTILINE)
    pins = pattern.findall(Path("requirements.lock").read_text())
    components = json.loads(Path("sbom.cdx.json").read_text())["components"]
    listed = {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in components}
    for installer in ("mscs", "pip"):
        listed.pop(installer, None)
    assert len(listed) > 100
    assert listed.items() <= {(name, version) for name, version, _ in pins}
    assert {name for name, _, marker in pins if not marker} <= listed.keys()
