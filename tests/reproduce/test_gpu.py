"""The sequence for the day a GPU is there: its bookkeeping, its verdicts, and a dry run on a bare machine."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Context, Item, Job, Run
from benchmarks.gpu_items import ITEMS
from benchmarks.gpu_page import CONTRASTIVE_SHARE, loss_targets, write_page
from reproduce import cli, plan

ROOT = Path(__file__).parents[2]
# fmt: off
BARE = [
    "annotated-doc", "anyio", "certifi", "charset-normalizer", "click", "contourpy", "cycler",
    "filelock", "fonttools", "fsspec", "h11", "hf-xet", "httpcore", "httpcore2", "httpx", "httpx2",
    "huggingface-hub",
    "hypothesis", "idna", "iniconfig", "jinja2", "joblib", "kiwisolver", "markdown-it-py", "markupsafe",
    "matplotlib", "mdurl", "mpmath", "networkx", "numpy", "opencv-python-headless", "packaging",
    "pandas", "pillow", "pip", "pluggy", "psutil", "pygments", "pyparsing", "pytest", "pytest-xdist",
    "execnet", "python-dateutil", "pyyaml", "regex", "requests", "rich", "safetensors", "scikit-image",
    "scikit-learn", "scipy", "setuptools", "shellingham", "six", "sortedcontainers", "sympy",
    "threadpoolctl", "timm", "torch", "torchmetrics", "torchvision", "tqdm", "triton", "truststore", "typer",
    "typing-extensions", "urllib3", "wheel",
]
# fmt: on
"""What was seen beside PyTorch on a machine with a GPU."""
CARRIED = ["pydantic", "pydantic-core", "annotated-types", "typing-inspection"]
SESSION = {
    "device": "a device",
    "rates": {"fp16": gpu.ESTIMATED_FOR},
    "finished": "now",
    "packages": {"torch": "2.11.0"},
    "more_packages": {"triton": "3.6.0"},
    "git": {"commit": None},
    "machine": {"python": "3.12.3", "cpu": "a processor", "cpus": 16},
}


def answer(value):
    return {"value": value}


def fail():
    raise RuntimeError("no luck")


class OutOfMemoryError(RuntimeError):
    """Named like PyTorch's."""


def exhaust():
    raise OutOfMemoryError


def crash():
    os._exit(3)


def hang():
    yield {"half": True}
    time.sleep(60)


def item(name, run, *jobs):
    return Item(name, name, lambda context: list(jobs), run)


def new_run(folder, params, seconds=600.0):
    run = Run(params, folder, time.monotonic() + seconds, dry_run=False)
    run.open(SESSION)
    return run


def states(run):
    return {name: entry["state"] for jobs in run.document["results"].values() for name, entry in jobs.items()}


def test_a_failure_ends_its_job_only_and_the_next_call_goes_on(params, tmp_path, capfd):
    items = [
        item("a", answer, Job("one", 1, {"value": 1}), Job("two", 1, {"value": 2}, later=True)),
        item("b", crash, Job("crash", 1, {})),
        item("c", fail, Job("failure", 1, {})),
        item("d", exhaust, Job("exhausted", 1, {})),
        item("e", answer, Job("last", 1, {"value": 3})),
    ]
    log = tmp_path / "log"
    run = new_run(tmp_path, params)
    run.round(items, False, log)
    assert states(run) == {"one": "measured", "last": "measured", "exhausted": "measured"} | {
        "crash": "failed",
        "failure": "failed",
    }
    results = run.document["results"]
    assert "exit code 3" in results["b"]["crash"]["error"]
    assert results["c"]["failure"]["error"] == "RuntimeError: no luck"
    assert results["d"]["exhausted"]["result"] == {"failed": "out of memory"}
    assert run.failures == 2
    assert "no luck" in log.read_text()
    assert json.loads(run.path.read_text()) == run.document

    again = new_run(tmp_path, params)
    capfd.readouterr()
    again.round(items, False, log)
    again.round(items, True, log)
    tried = re.findall(r"^\w: (\w+), about", capfd.readouterr().out, flags=re.MULTILINE)
    assert tried == ["crash", "failure", "two"], "what failed is tried again, what is measured is not"
    assert len(again.document["sessions"]) == 2
    assert again.document["results"]["a"]["one"]["session"] == 0


def test_what_takes_too_long_is_cut_off_and_what_does_not_fit_is_skipped(params, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "PATIENCE", 0.1)
    monkeypatch.setattr(gpu, "PATIENCE_SECONDS", 30.0)
    items = [
        item("a", answer, Job("first", 0.1, {"value": 0})),  # starts what starts processes
        item("b", hang, Job("hanging", 0.1, {})),
        item("c", answer, Job("long", 5000, {"value": 1}), Job("short", 0.1, {"value": 1})),
    ]
    run = new_run(tmp_path, params)
    run.round(items[:1], False, tmp_path / "log")
    monkeypatch.setattr(gpu, "PATIENCE_SECONDS", 6.0)
    begun = time.monotonic()
    run.round(items[1:2], False, tmp_path / "log")
    assert time.monotonic() - begun < 40
    monkeypatch.setattr(gpu, "PATIENCE_SECONDS", 30.0)
    run.round(items[2:], False, tmp_path / "log")
    assert states(run) == {"first": "measured", "hanging": "cut off", "short": "measured"}
    assert run.document["results"]["b"]["hanging"]["result"] == {"half": True}, "parts stand"
    assert run.skipped == ["c: long (about 5008 s)"]


def test_estimates_follow_the_device_and_then_what_was_seen(params, tmp_path):
    run = new_run(tmp_path, params)
    one = item("a", answer)
    assert run.scale(one) == 1.0
    run.document["sessions"][-1] = {"rates": {"fp16": gpu.ESTIMATED_FOR / 2}}
    assert run.scale(one) == 2.0
    run.document["results"]["a"] = {"x": {"state": "measured", "estimate": 10, "seconds": 5}}
    assert run.scale(one) == 0.5


def case(rows, method, ms, size):
    return {"rows": rows, "columns": rows, "method": method, "both_ms": ms, "extra_bytes": size}


def test_targets_of_the_loss_are_judged():
    results = [
        {"cases": [case(10_000, "dense", 70, 6_000), case(10_000, "ours, fp32 grade", 10, 101)]},
        {"cases": [case(32_768, "dense", 100, 10_000)]},
        {"cases": [{"rows": 65_536, "method": "dense", "skipped": "needs 131 GiB"}]},
        {"cases": [case(65_536, "ours, fp32 grade", 40, 60), case(65_536, "ours, fp16 grade", 24, 60)]},
        {"kernels": []},
    ]
    found = loss_targets(results)
    assert [target.found for target in found] == pytest.approx([7, 59.41, 10, 16.67, 666.7], rel=1e-3)
    assert [target.hit for target in found] == [True, False, True, False, True]
    assert [target.note for target in found] == ["", ""] + ["dense scaled from 32768 rows"] * 3
    assert [target.hit for target in loss_targets([])] == [None] * 5


def measured(result, **arguments):
    return {
        "state": "measured",
        "session": 0,
        "estimate": 1,
        "seconds": 1,
        "arguments": arguments,
        "result": result,
    }


def step_entry(params, run, share):
    settings = params.resolve(run, "paper").settings
    options = {key: getattr(settings.machine, key) for key in plan.OPTIONS}
    job = {"row": settings.schedule.name, "loss": settings.loss.name, "run": run, "profile": "paper"}
    job |= {
        "variant": "settings",
        "options": options,
        "batch": settings.schedule.images_per_group,
        "quick": False,
    }
    result = {"crop": [512, 1024], "step_ms": 250.0, "images_per_s": 12.0, "contrastive_share": share}
    return measured(result | {"peak_bytes": 2**33, "parts_ms": {}}, job=job)


def test_the_page_judges_and_what_it_exports_is_read_by_plan(params, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = "cityscapes-hrnet-hr48-ours"
    cases = [case(10_000, "dense", 70, 6_000), case(10_000, "ours, fp32 grade", 10, 101)]
    results = {
        "tests": {"tests marked gpu": measured({"passed": 16, "skipped": 0, "failed": ["a.b"]})},
        "loss": {"10000 rows": measured({"cases": [c | {"share_of_matmul": 0.5} for c in cases]})},
        "memory": {
            "x": measured({"dense_gb": "OOM", "ours_gb": 9.5, "cap_gb": 24.0}, run=f"{run}-all", cap_gb=24.0)
        },
        "step": {
            "one": step_entry(params, run, 0.04),
            "two": step_entry(params, "cadis-ocrnet-r50-ours", CONTRASTIVE_SHARE + 0.001),
        },
        "training": {"killed": {"state": "failed", "error": "RuntimeError: lost"}},
        "feed": {"x": measured({"dataset": "cityscapes", "workers": 16, "images_per_s": 11.0})},
    }
    context = Context(params, False, tmp_path, "a device", results)
    document = {"device": "a device", "dry_run": False, "sessions": [SESSION], "results": results}
    text = write_page(context, document, tmp_path / "gpu-a-device.json", ITEMS, ["loss: x"]).read_text()
    assert "16 passed, 0 skipped, 1 failed.\n- a.b" in text
    assert "| 10000 rows, ours, fp32 grade: times faster | 7 | 7.0 | hit |" in text
    assert "| 10000 rows, ours, fp32 grade: times smaller | 60 | 59.4 | missed |" in text
    assert "| 65536 rows, ours, fp16 grade: times faster | 17 |  | not measured |" in text
    assert "| 4.0% | hit |" in text
    assert "| 5.1% | missed |" in text
    assert "| x | OOM | 9.5 |" in text
    assert "| cityscapes | 16 | 11.0 | 12.0 | missed |" in text
    assert "- killed: RuntimeError: lost" in text
    assert "- profile of ours, fp32 grade, 10000 rows" in text, "a missed target is to be profiled"
    assert "Python 3.12.3" in text
    assert "torch 2.11.0, triton 3.6.0" in text

    (cost,) = plan.costs([params.resolve(run, "paper").settings], "a device")
    assert cost.hours == pytest.approx(120_000 * 4 * 0.25 / 3600)
    assert json.loads((tmp_path / "memory.json").read_text())["runs"] == {
        f"{run}-all": {"dense_gb": "OOM", "ours_gb": 9.5}
    }
    assert len(list(tmp_path.glob("step-a-device-paper.json"))) == 1


def test_the_command_lists_the_items_and_refuses_misuse(capsys):
    assert tuple(item.name for item in ITEMS) == cli.GPU_ITEMS
    assert cli.main(["gpu", "lost"]) == 2
    assert "did you mean 'loss'" in capsys.readouterr().err
    assert cli.main(["gpu", "--minutes", "0"]) == 2


@pytest.mark.parametrize("dry_run", [False, True])
def test_names_of_jobs_differ_and_every_job_has_an_estimate(params, tmp_path, dry_run):
    context = Context(params, dry_run, tmp_path, "a device", {})
    for one in ITEMS:
        jobs = one.jobs(context)
        assert jobs, one.name
        assert len({job.name for job in jobs}) == len(jobs), one.name
        assert all(job.seconds > 0 for job in jobs)
        json.dumps([job.arguments for job in jobs])


def test_every_row_is_stepped_and_its_figures_have_a_peer_where_one_is_published(params, tmp_path):
    from benchmarks.gpu_page import MMSEGMENTATION

    step = next(one for one in ITEMS if one.name == "step")
    jobs = [job.arguments["job"] for job in step.jobs(Context(params, False, tmp_path, "a device", {}))]
    rows = {params.resolve(run, "paper").settings.schedule.name for run in params.runs_of("paper")}
    assert {job["row"] for job in jobs} == rows
    assert {job["variant"] for job in jobs} >= {
        "fp32 plain",
        "bf16 channels-last compile",
        "fp32 plain deterministic",
    }
    at_their_size = {(job["row"], job["batch"]) for job in jobs if job["loss"] == "ce"}
    assert {(row, images) for row, (images, _) in MMSEGMENTATION.items()} <= at_their_size


def test_the_sequence_itself_loads_no_pytorch():
    """Seconds of the minutes that there are."""
    code = (
        "import sys; from pathlib import Path; from mscs.params import load_params\n"
        "from benchmarks import gpu, gpu_items, gpu_page\n"
        "context = gpu.Context(load_params(), False, Path(), 'a device', {})\n"
        "jobs = [job for item in gpu_items.ITEMS for job in item.jobs(context)]\n"
        "sys.exit(not jobs or 'torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_without_a_gpu_the_command_says_so(tmp_path, monkeypatch, capsys):
    class NoGpu(gpu.Worker):
        def __init__(self, log):
            pass

        def ask(self, *_):
            yield "measured", SESSION | {"gpu": False}

        def close(self):
            pass

    monkeypatch.setattr(gpu, "Worker", NoGpu)
    assert cli.main(["gpu", "--out", str(tmp_path)]) == 1
    assert "PyTorch sees no GPU here" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.json"))


@pytest.fixture
def bare_machine(tmp_path):
    """Return an environment that can import what a bare machine and the wheels taken along have."""
    allowed = {*BARE, *CARRIED, "mscs"}
    blocked = {
        module
        for module, packages in importlib.metadata.packages_distributions().items()
        if not any(re.sub("[-_.]+", "-", name).lower() in allowed for name in packages)
        and not any(re.match("nvidia|cuda", name) for name in packages)
    }
    assert {"dvc", "pooch", "ruamel", "docker", "imagecodecs"} <= blocked
    (tmp_path / "sitecustomize.py").write_text(
        "from importlib.machinery import PathFinder\n"
        "find = PathFinder.find_spec\n"
        "def bare(cls, name, path=None, target=None):\n"
        f"    return None if name.partition('.')[0] in {blocked!r} else find(name, path, target)\n"
        "PathFinder.find_spec = classmethod(bare)\n"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def dry_run(folder, environment, *items):
    command = [sys.executable, "-m", "reproduce", "gpu", "--dry-run", "--minutes", "30"]
    command += ["--out", str(folder), *items]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    log = folder / "gpu.log"
    said = done.stdout + done.stderr + (log.read_text()[-3000:] if log.exists() else "")
    assert done.returncode == 0, said
    document = json.loads((folder / "gpu-dry-run.json").read_text())
    for name in items:
        assert document["results"][name], name
        assert {entry["state"] for entry in document["results"][name].values()} == {"measured"}, said
    page = (folder / "gpu-dry-run.md").read_text()
    assert "These numbers mean nothing" in page
    return document, page


def test_a_dry_run_goes_through_the_sequence_on_a_bare_machine(bare_machine, tmp_path):
    document, page = dry_run(tmp_path / "out", bare_machine, "loss", "memory", "inference", "feed")
    methods = {case["method"] for entry in document["results"]["loss"].values()
               for case in entry["result"].get("cases", ())}  # fmt: skip
    assert {"dense", "ours, fp32 grade", "ours, fp16 grade", "all, dense", "all, ours"} <= methods
    kernels = document["results"]["loss"]["profile of ours, fp16 grade, 48 rows"]["result"]["kernels"]
    assert kernels[0]["ms"] > 0
    assert document["sessions"][0]["packages"]["torch"]
    assert document["sessions"][0]["more_packages"]["triton"]
    assert "| 65536 rows, ours, fp32 grade: times smaller | 600 |  | not measured |" in page
    assert not list((tmp_path / "out").glob("gpu-[!d]*")), "a dry run never writes where measurements stand"


@pytest.mark.slow
def test_a_dry_run_of_what_trains(bare_machine, tmp_path):
    out = tmp_path / "out"
    document, page = dry_run(out, bare_machine, "tests", "step", "small", "training")
    results = document["results"]
    tests = results["tests"]["tests marked gpu"]["result"]
    assert tests["failed"] == []
    assert tests["passed"] + tests["skipped"] >= 17
    assert results["training"]["killed and resumed"]["result"]["bit_identical"]
    assert results["training"]["killed and resumed"]["result"]["killed"]
    exact = results["training"]["one process and two, fp64"]["result"]
    assert exact["largest_relative_difference"] < 1e-8
    assert len(results["small"]["2 trainings side by side"]["result"]["scores"]) == 2
    assert (out / "gpu-small.tar.gz").stat().st_size < 2**20
    assert len(list(out.iterdir())) <= 8, "no more files than can be brought back"
    assert "killed True, same losses bit for bit True" in page
