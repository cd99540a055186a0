"""The benchmark of the networks runs and reports what it says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "models.py"


@pytest.mark.slow
def test_quick_benchmark_of_one_row(tmp_path):
    command = [
        sys.executable,
        SCRIPT,
        "--quick",
        "--rows",
        "cadis",
        "--libraries",
        "mscs",
        "--output",
        tmp_path,
    ]
    subprocess.run(command, check=True)
    (result,) = json.loads((tmp_path / "models.json").read_text())["results"]
    assert result["row"] == "cadis-ocrnet-r50"
    assert result["batch"] == 2
    assert round(result["parameters"] / 1e6, 2) == 38.88
    assert 0 < result["forward_s"] < result["train_s"]
    assert result["flops"] > 1e9
    assert result["peak_gb"] > 0.1
    assert "cadis-ocrnet-r50 | mscs: ocrnet resnet50.tv_in1k" in (tmp_path / "models.md").read_text()
