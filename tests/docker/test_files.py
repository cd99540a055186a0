"""The container files as text: they agree with each other and with the project. No engine needed."""

import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "docker"


def services(name):
    return yaml.safe_load((DOCKER / name).read_text())["services"]


def test_compose_serves_the_verbs_with_runs_that_exist(params):
    found = services("compose.yaml")
    assert set(found) == {"train", "evaluate", "repro", "tables", "test", "shell"}
    assert found["train"]["command"][0] in params.runs
    assert found["evaluate"]["command"] == found["train"]["command"]
    for name, service in found.items():
        default = "bridge" if name == "shell" else "none"
        assert service["network_mode"] == f"${{MSCS_NETWORK:-{default}}}"
        assert "deploy" not in service
    assert set(services("compose.gpu.yaml")) == set(found) - {"tables"}


def test_every_variable_of_compose_has_a_default_and_is_explained():
    text = (DOCKER / "compose.yaml").read_text()
    variables = set(re.findall(r"\$\{(\w+)", text))
    assert variables == set(re.findall(r"\$\{(\w+):-", text))
    explained = set(re.findall(r"^#?(\w+)=", (ROOT / ".env").read_text(), re.MULTILINE))
    by_hand = {"GIT_COMMIT", "LOCK_DIGEST", "CITYSCAPES_USERNAME", "CITYSCAPES_PASSWORD"}
    assert variables - by_hand == explained - {"COMPOSE_FILE", "COMPOSE_PROJECT_NAME"}
    assert all(
        (ROOT / name).exists() for name in re.findall(r"docker/[\w.]+yaml", (ROOT / ".env").read_text())
    )


def test_what_the_build_copies_exists_and_nothing_private_enters_it():
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE)
    assert all((ROOT / name).exists() for name in allowed)
    assert not {".git", ".env", "data", "work", "results"} & set(allowed)
    dockerfile = (DOCKER / "Dockerfile").read_text()
    assert "RUN --mount" not in dockerfile
    stages = re.findall(r"^FROM \S+ AS (\S+)", dockerfile, re.MULTILINE)
    for stage in ("train", "report"):
        body = dockerfile.split(f" AS {stage}\n")[1].split("\nFROM ")[0]
        assert body.index("COPY --from=") < body.index("COPY . .") < body.index("ARG GIT_COMMIT")
        assert "USER 10001:10001" in body
        assert stage in stages


def test_the_entrypoint_parses():
    subprocess.run(["sh", "-n", DOCKER / "entrypoint.sh"], check=True)


def test_the_kubernetes_job_names_a_known_run_and_the_users_image(params):
    job = yaml.safe_load((DOCKER / "cluster/job.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["args"][:2] == ["mscs", "train"]
    assert container["args"][2] in params.runs
    assert job["metadata"]["name"] == f"mscs-{container['args'][2]}"
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["volumes"]
    }
    assert pod["securityContext"]["runAsUser"] == 10001
