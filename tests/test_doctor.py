"""The machine check: what each finding says for machines that are not this one."""

import json
import subprocess
import sys
import types

import pytest

from mscs import doctor
from mscs.cli import main
from mscs.params import load_params


def states(findings):
    return {finding.name: finding.state for finding in findings}


def test_every_warning_and_problem_has_a_remedy_and_the_exit_code_follows(capsys, monkeypatch):
    monkeypatch.delenv("MSCS_IN_CONTAINER", raising=False)
    monkeypatch.setenv("CITYSCAPES_PASSWORD", "hidden-password")
    for profile in ("mini", "small", "paper"):
        code = main(["doctor", "--profile", profile, "--json"])
        text = capsys.readouterr().out
        findings = json.loads(text)
        assert "hidden" not in text
        assert {"python", "packages", "gpu", "docker", "disk", "memory", "dvc cache"} <= {
            finding["name"] for finding in findings
        }
        for finding in findings:
            assert finding["state"] in doctor.STATES
            assert bool(finding["remedy"]) == (finding["state"] != "ok"), finding
        assert code == any(finding["state"] == "problem" for finding in findings)


def test_lines_for_people(capsys, monkeypatch):
    found = [doctor.Finding("disk", "warning", "1 GB", "free some")]
    monkeypatch.setattr(doctor, "examine", lambda profile: iter(found))
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.split() == ["warning", "disk", "1", "GB", "->", "free", "some"]
    found.append(doctor.Finding("gpu", "problem", "none", "get one"))
    assert main(["doctor"]) == 1


def test_an_unknown_profile_is_misuse(capsys):
    assert main(["doctor", "--profile", "papr"]) == 2
    assert "did you mean 'paper'" in capsys.readouterr().err


def test_packages_that_were_never_accepted(monkeypatch, tmp_path):
    assert doctor.check_packages().state == "ok"
    monkeypatch.chdir(tmp_path)
    assert "numerics.yaml" in doctor.check_packages().found
    versions = '{torch: ["0.1"], no-such-package: ["1.0"]}'
    (tmp_path / "numerics.yaml").write_text(f"units: {{packages: {{version: 1, accepted: {versions}}}}}")
    found = doctor.check_packages()
    assert found.state == "warning"
    assert "(accepted: 0.1), no-such-package not installed (accepted: 1.0)" in found.found


@pytest.mark.parametrize(
    ("gpus", "cuda", "expected"),
    [
        ([], 0, {"gpu": "problem"}),
        ([("H200", 139.0)], 13000, {"gpu": "ok", "driver": "ok"}),
        ([("T4", 15.0)], 12040, {"gpu": "warning", "driver": "problem"}),
        ([("A100", 80.0)] * 4, 13010, {"gpu": "ok", "driver": "ok", "nccl": "ok"}),
    ],
)
def test_gpus(monkeypatch, gpus, cuda, expected):
    monkeypatch.setattr(doctor, "nvidia", lambda: (gpus, "580.1", cuda))
    monkeypatch.setattr(doctor, "_version", lambda name: "2.30")
    assert states(doctor.check_gpus("paper")) == expected
    if not gpus:
        assert states(doctor.check_gpus("mini")) == {"gpu": "ok"}


def engine(monkeypatch, runtimes, label):
    import docker

    client = types.SimpleNamespace(
        info=lambda: {"ServerVersion": "28.0", "Runtimes": dict.fromkeys(runtimes)},
        images=types.SimpleNamespace(
            get=lambda name: types.SimpleNamespace(labels={"mscs.lock": label}, short_id="sha256:12")
        ),
    )
    monkeypatch.setattr(docker, "from_env", lambda **_: client)


def test_docker(monkeypatch, tmp_path):
    monkeypatch.delenv("MSCS_RUNTIME", raising=False)
    monkeypatch.delenv("MSCS_IN_CONTAINER", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requirements.lock").write_text("")
    engine(monkeypatch, ["runc", "nvidia"], "e3b0c44298fc")
    assert states(doctor.check_docker("paper")) == {"docker": "ok", "docker gpu": "ok", "image": "ok"}
    engine(monkeypatch, ["runc"], "older")
    assert states(doctor.check_docker("paper")) == {
        "docker": "ok",
        "docker gpu": "problem",
        "image": "warning",
    }
    assert states(doctor.check_docker("mini"))["docker gpu"] == "warning"
    monkeypatch.setenv("MSCS_RUNTIME", "native")
    assert states(doctor.check_docker("paper"))["docker gpu"] == "warning"


def test_no_engine_is_a_problem_only_where_one_is_needed(monkeypatch, tmp_path):
    monkeypatch.undo()
    for name in ("MSCS_RUNTIME", "MSCS_IN_CONTAINER"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    assert states(doctor.check_docker("paper")) == {"docker": "problem"}
    assert states(doctor.check_docker("mini")) == {"docker": "warning"}
    monkeypatch.setenv("MSCS_IN_CONTAINER", "1")
    assert states(doctor.examine("paper"))["docker"] == "ok"


def test_a_cluster_needs_sbatch_and_no_docker(monkeypatch, tmp_path):
    monkeypatch.delenv("MSCS_IN_CONTAINER", raising=False)
    monkeypatch.setenv("MSCS_RUNTIME", "slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    found = states(doctor.examine("paper"))
    assert found["slurm"] == "problem"
    assert "docker" not in found
    (tmp_path / "sbatch").touch(0o755)
    assert states(doctor.examine("paper"))["slurm"] == "ok"


def test_data_folders_and_login(monkeypatch, tmp_path):
    monkeypatch.setenv("MSCS_DATA", str(tmp_path))
    for name in ("CITYSCAPES_USERNAME", "CITYSCAPES_PASSWORD"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "ade20k").mkdir()
    params = load_params()
    found = states(doctor.check_data(params, "paper"))
    paper = {f"data {name}" for name in ("cityscapes", "ade20k", "pascal_context", "cadis")}
    assert found.keys() == {*paper, "cityscapes login"}
    assert [name for name, state in found.items() if state == "ok"] == ["data ade20k"]
    assert found["cityscapes login"] == "warning"
    assert states(doctor.check_data(params, "mini")) == {"data": "ok"}
    assert states(doctor.check_data(params, "small")) == {"data camvid": "warning"}
    (tmp_path / "cityscapes").mkdir()
    assert states(doctor.check_data(params, "paper"))["cityscapes login"] == "ok"


def test_room(monkeypatch):
    usage = types.SimpleNamespace(free=1e9, total=64e6)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    found = states(doctor.check_room("mini"))
    assert found["disk"] == "warning"
    assert found["shared memory"] == "problem"


@pytest.mark.parametrize(
    ("kinds", "state"), [("symlink,copy", "problem"), ('"reflink,copy"', "ok"), (None, "ok")]
)
def test_symbolic_links_out_of_the_cache_are_a_problem(monkeypatch, tmp_path, kinds, state):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    if kinds:
        (tmp_path / ".dvc").mkdir()
        (tmp_path / ".dvc/config").write_text(f"[core]\n    analytics = false\n[cache]\n    type = {kinds}\n")
    assert doctor.check_links().state == state


def test_doctor_loads_neither_pytorch_nor_dvc():
    code = "import sys; from mscs.cli import main; main(['doctor'])\n"
    code += "sys.exit(bool({'torch', 'dvc', 'numpy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
