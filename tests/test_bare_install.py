"""What works with PyTorch alone, as `pip install` without an extra leaves it."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# PyTorch and what it requires itself
TORCH = (
    *(
        "torch",
        "torchgen",
        "functorch",
        "triton",
        "nvidia",
        "sympy",
        "isympy",
        "mpmath",
        "networkx",
        "jinja2",
    ),
    *("markupsafe", "filelock", "fsspec", "setuptools", "pkg_resources", "typing_extensions"),
)
BLOCK = """
import sys
sys.modules |= dict.fromkeys(BLOCKED)  # None: not to be found
"""
USE = """
import torch
from mscs.losses import *
maps = [torch.randn(2, 8, size, size, requires_grad=True) for size in (16, 8)]
labels = torch.randint(3, (2, 4, 4)).repeat_interleave(8, 1).repeat_interleave(8, 2)
loss = MultiScaleContrastiveLoss((1.0, 0.7), ((0, 1),))
total = loss(maps, labels).total + segmentation_loss(torch.randn(2, 3, 32, 32), labels)
total.backward()
assert maps[0].grad.abs().sum() > 0
contrastive_loss(torch.randn(600, 8), torch.randint(3, (600,)))
own = [name for name in sys.modules if name.startswith("mscs.") and not name.startswith("mscs.losses")]
assert not own, own
"""


def run(code: str) -> subprocess.CompletedProcess:
    blocked = {*packages_distributions(), "yaml"} - {*TORCH, "mscs", "reproduce"}
    return subprocess.run(
        [sys.executable, "-c", f"BLOCKED = {blocked!r}{BLOCK}{code}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_losses_need_torch_alone():
    done = run(USE)
    assert done.returncode == 0, done.stderr


def test_the_command_names_the_missing_extra():
    done = run("from mscs.__main__ import main; sys.exit(main())")
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line.startswith("mscs: error: this command needs ")
    assert "pip install 'mscs[train]'" in line
    assert "mscs.losses" in line


def test_an_error_in_the_command_line_itself_is_not_hidden():
    done = run("sys.modules['mscs.cli'] = None\nfrom mscs.__main__ import main; sys.exit(main())")
    assert done.returncode == 1
    assert "Traceback" in done.stderr


def test_the_base_install_is_torch_and_mscs():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    [requirement] = settings["project"]["dependencies"]
    assert requirement.startswith("torch>=")
    assert settings["tool"]["setuptools"]["packages"]["find"]["include"] == ["mscs*"]


@pytest.mark.slow
@pytest.mark.parametrize("resolution", ["lowest-direct", "highest"], ids=["oldest", "newest"])
def test_a_fresh_install_passes_the_tests_of_the_losses(resolution, tmp_path, copy_project):
    """Gigabytes from the package index: PyTorch in the oldest version allowed, and in the newest."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None or (resolution == "lowest-direct" and sys.version_info >= (3, 13)):
        pytest.skip("needs uv, and for the oldest PyTorch a Python before 3.13")
    python = str(tmp_path / "venv" / "bin" / "python")
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"], check=True)
    install = [uv, "pip", "install", "--quiet", "--python", python, "--resolution", resolution]
    done = subprocess.run([*install, copy_project(small=False)], capture_output=True, text=True, cwd=tmp_path)
    if "error sending request" in done.stderr:
        pytest.skip("needs the package index")
    assert done.returncode == 0, done.stderr
    listed = subprocess.run(
        [uv, "pip", "list", "--format", "json", "--python", python], check=True, capture_output=True
    )
    names = {package["name"] for package in json.loads(listed.stdout)}
    assert {"mscs", "torch"} <= names
    assert not {"numpy", "pydantic", "pyyaml", "timm"} & names
    used = subprocess.run([python, "-c", USE.replace("sys.", "__import__('sys').")], cwd=tmp_path)
    assert used.returncode == 0
    assert subprocess.run([python, "-c", "import reproduce"], cwd=tmp_path, capture_output=True).returncode
    examples = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "docs/loss.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(examples) == 2
    for example in examples:
        assert subprocess.run([python, "-c", example], cwd=tmp_path).returncode == 0
    command = subprocess.run([tmp_path / "venv" / "bin" / "mscs"], capture_output=True, text=True)
    assert command.returncode == 2
    assert "pip install 'mscs[train]'" in command.stderr

    subprocess.run([*install, "pytest>=8", "hypothesis>=6.100", "numpy>=1.26"], check=True, cwd=tmp_path)
    shutil.copytree(ROOT / "tests" / "losses", tmp_path / "tests" / "losses")
    shutil.copytree(ROOT / "tests" / "golden", tmp_path / "tests" / "golden")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    tests = [python, "-m", "pytest", "-m", "not gpu and not slow", "tests/losses"]
    done = subprocess.run(tests, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
