"""Small generated data and settings that several test files share."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="session")
def generated(tmp_path_factory):
    """Return a function that draws a small dataset once and gives its folder."""
    from mscs.datasets.synth import write_dataset

    roots: dict[str, Path] = {}

    def draw(name: str) -> Path:
        if name not in roots:
            root = tmp_path_factory.mktemp("data") / name
            write_dataset(name, root, train=8, val=3, image_size=(64, 96), progress=False)
            roots[name] = root
        return roots[name]

    return draw


@pytest.fixture(scope="session")
def params():
    from mscs.params import load_params

    return load_params(ROOT / "params.yaml")
