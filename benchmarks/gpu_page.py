"""The page of `python -m reproduce gpu`: measured figures beside what is wanted, failures, what remains."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu import FAILED, MEASURED, Context, Item, slug
from mscs.paths import WORK
from mscs.results import write_json, write_text
from reproduce import plan
from reproduce.cells import TABLES, table_runs
from reproduce.rendering import markdown_list, markdown_page, markdown_table

FP32, FP16 = "ours, fp32 grade", "ours, fp16 grade"
WANTED = (
    ("faster", 10_000, FP32, 7),
    ("smaller", 10_000, FP32, 60),
    ("faster", 65_536, FP32, 9),
    ("faster", 65_536, FP16, 17),
    ("smaller", 65_536, FP32, 600),
)
"""Times faster or smaller than the dense formula the loss has to be, at so many anchors."""
CONTRASTIVE_SHARE = 0.05
"""Of a training step, the most that the contrastive loss may take."""
MMSEGMENTATION = {
    "cityscapes-hrnet-hr48": (2, 6.2),
    "cityscapes-ocrnet-hr48": (2, 8.0),
    "cityscapes-deeplabv3-r101": (2, 9.6),
    "cityscapes-upernet-r101": (2, 7.4),
    "ade20k-ocrnet-hr48": (4, 11.2),
    "ade20k-deeplabv3-r101": (4, 12.4),
    "ade20k-upernet-r101": (4, 9.1),
    "ade20k-upernet-swint": (2, 5.02),
    "ade20k-upernet-swins": (2, 6.17),
    "ade20k-upernet-swinb22k": (2, 7.61),
}
"""Images per GPU and GB, by row of Tables 4 to 7: metafile.yaml of its configs, V100, cross-entropy only, the
same crop. Its HRNet has an FCN head like ours, its Swin-B other weights; for the other rows there is none."""
KERNELS = 6  # shown of a profile


@dataclass(frozen=True)
class Target:
    """A figure beside what is wanted; `found` and `hit` are None where nothing was measured."""

    kind: str
    rows: int
    method: str
    wanted: float
    found: float | None
    note: str = ""

    @property
    def hit(self) -> bool | None:
        """Whether the target was reached."""
        return None if self.found is None else self.found >= self.wanted


def loss_targets(results: Iterable[Mapping[str, Any]]) -> list[Target]:
    """Return the wanted ratios of the loss beside those found.

    Where the dense formula did not fit into memory, its time and memory at fewer rows are scaled by the
    number of similarities.
    """
    cases = {(c["rows"], c["method"]): c for c in _self_cases(results) if "skipped" not in c}
    found = []
    for kind, rows, method, wanted in WANTED:
        key = "both_ms" if kind == "faster" else "extra_bytes"
        ours, sizes = cases.get((rows, method)), [n for n, name in cases if name == "dense" and n <= rows]
        value, note = None, ""
        if ours is not None and sizes:
            base = max(sizes)
            value = cases[base, "dense"][key] * (rows / base) ** 2 / ours[key]
            note = "" if base == rows else f"dense scaled from {base} rows"
        found.append(Target(kind, rows, method, wanted, value, note))
    return found


def _self_cases(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [case for result in results for case in result.get("cases", ()) if "rows" in case]


def write_page(
    context: Context, document: Mapping[str, Any], state: Path, items: Sequence[Item], skipped: Sequence[str]
) -> Path:
    """Write the page beside the state file, and the files that others read; return the page."""
    export(context, document)
    sections = {
        "tests": tests,
        "loss": loss,
        "memory": memory,
        "step": steps,
        "small": small,
        "training": training,
        "inference": inference,
        "feed": feed,
    }
    blocks = [f"# Measured on {document['device']}", heading(document)]
    for item in items:
        entries = context.results.get(item.name, {})
        failed = [f"{name}: {e['error']}" for name, e in entries.items() if e["state"] == FAILED]
        open_jobs = [job.name for job in item.jobs(context) if _state(entries, job.name) != MEASURED]
        blocks.append(f"## {item.title}")
        try:
            blocks += sections[item.name](context)
        except Exception as error:  # one odd result must not cost the page of the others
            blocks.append(f"This part of the page failed, the state file has its figures: {error!r}")
        blocks += [markdown_list("Failed:", failed)]
        blocks += [
            markdown_list("Remaining:", [name for name in open_jobs if _state(entries, name) != FAILED])
        ]
    blocks += [markdown_list("## Skipped in the last call for want of time", skipped)]
    path = state.with_suffix(".md")
    write_text(path, markdown_page(*blocks))
    return path


def _state(entries: Mapping[str, Any], name: str) -> str:
    return entries.get(name, {}).get("state", "")


def heading(document: Mapping[str, Any]) -> str:
    """Return what the figures were measured with, call by call."""
    lines = []
    for number, session in enumerate(document["sessions"], start=1):
        packages = {**session["packages"], **session["more_packages"]}
        rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in session["rates"].items())
        versions = ", ".join(f"{name} {version}" for name, version in packages.items())
        host, commit = session["machine"], session["git"]["commit"] or "unknown"
        lines.append(
            f"call {number}: {session['finished']}, commit {commit[:12]}, Python {host['python']}, "
            f"{host['cpu']}, {host['cpus']} cores, driver {host.get('driver', 'none')}, "
            f"matrix products {rates}; {versions}"
        )
    stamp = "Dry run: tiny sizes on a CPU, Triton interpreted. These numbers mean nothing."
    return markdown_list(stamp if document["dry_run"] else "Measured by `python -m reproduce gpu`:", lines)


def export(context: Context, document: Mapping[str, Any]) -> None:
    """Write the steps as `python -m reproduce plan` reads them, and Table 2(a)'s memory.json."""
    name, profile = slug(context.device), "mini" if context.dry_run else "paper"
    rows = step_rows(context)
    facts = {"device": context.device, "profile": profile, "quick": context.dry_run}
    packages = document["sessions"][-1]["packages"]
    for folder in (context.out, WORK / profile / "benchmark") if rows else ():
        write_json(folder / f"step-{name}-{profile}.json", facts | {"packages": packages, "results": rows})
    peaks = [e for e in _measured(context, "memory") if e["arguments"]["cap_gb"] is not None]
    capped = {
        entry["arguments"]["run"]: {key: entry["result"][key] for key in ("dense_gb", "ours_gb")}
        for entry in peaks
        if "failed" not in entry["result"]
    }
    if capped:
        cap = peaks[0]["result"]["cap_gb"]
        facts = {"device": context.device, "cap_gb": cap, "packages": packages, "runs": capped}
        write_json(context.out / "memory.json", facts)


def _measured(context: Context, item: str) -> list[dict[str, Any]]:
    return [entry for entry in context.results.get(item, {}).values() if entry["state"] == MEASURED]


def step_rows(context: Context) -> list[dict[str, Any]]:
    """Return the measured steps, each with the facts of its job."""
    return [{**entry["arguments"]["job"], **entry["result"]} for entry in _measured(context, "step")]


def tests(context: Context) -> list[str]:
    """Return how many passed, and which failed."""
    return [
        f"{result['passed']} passed, {result['skipped']} skipped, {len(result['failed'])} failed."
        + "".join(f"\n- {name}" for name in result["failed"])
        for result in context.measured("tests")
    ]


def loss(context: Context) -> list[str]:
    """Return the cases, the targets, and the profiles of what missed them."""
    results = context.measured("loss")
    cases = sorted(_self_cases(results), key=lambda case: case["rows"])
    header = ["rows", "method", "both ms", "extra MiB", "of the roofline", "note"]
    shown = [[c["rows"], c["method"], *_case(c)] for c in cases]
    whole = [
        [name, case["method"], *_case(case)]
        for name, entry in context.results.get("loss", {}).items()
        for case in entry.get("result", {}).get("cases", ())
        if "rows" not in case
    ]
    targets = [
        [f"{t.rows} rows, {t.method}: times {t.kind}", t.wanted, _number(t.found), verdict(t.hit), t.note]
        for t in loss_targets(results)
    ]
    profiles = [
        f"{name}: " + "; ".join(f"{k['kernel']} {k['ms']:.2f} ms ({k['calls']})" for k in kernels[:KERNELS])
        for name, entry in context.results.get("loss", {}).items()
        if (kernels := entry.get("result", {}).get("kernels"))
    ]
    return [
        markdown_table(header, shown),
        markdown_table(["case", *header[1:]], whole),
        markdown_table(["wanted", "at least", "found", "verdict", "note"], targets),
        markdown_list("Slowest kernels:", profiles),
        "Roofline: six operations per similarity and channel, all at the rate of matrix products that was "
        "measured in the same call, fp16 for this package and fp32 for the dense formula.",
    ]


def _case(case: Mapping[str, Any]) -> list[str]:
    if "skipped" in case:
        return ["", "", "", case["skipped"]]
    share = f"{case['share_of_matmul']:.0%}" if "share_of_matmul" in case else ""
    return [f"{case['both_ms']:.2f}", f"{case['extra_bytes'] / 2**20:.1f}", share, ""]


def memory(context: Context) -> list[str]:
    """Return Table 2(a)'s peaks, and the rows' beside what mmsegmentation publishes."""
    peaks = [
        [name, entry["result"].get("dense_gb", "failed"), entry["result"].get("ours_gb", "failed")]
        for name, entry in context.results.get("memory", {}).items()
        if entry["state"] == MEASURED
    ]
    rows = []
    for step in step_rows(context):
        if step["variant"] == "settings" and "failed" not in step:
            published = MMSEGMENTATION if step["loss"] == "ce" else {}
            images, gigabytes = published.get(step["row"], ("", ""))
            peak = f"{step['peak_bytes'] / 2**30:.2f}"
            rows.append([step["row"], step["loss"], step["batch"], peak, images, gigabytes])
    header = ["row", "loss", "images", "GiB", "mmsegmentation's images", "its GB"]
    return [markdown_table(["run", "dense GiB", "this package GiB"], peaks), markdown_table(header, rows)]


def steps(context: Context) -> list[str]:
    """Return every step with its hours on one GPU, and the hours of every table."""
    header = ["row", "loss", "options", "images x crop", "step ms", "images/s", "steps/s", "GPU-hours"]
    header += ["GiB", "contrastive share", f"at most {CONTRASTIVE_SHARE:.0%}"]
    rows = []
    for step in step_rows(context):
        start = [step["row"], step["loss"], step["variant"], step["batch"]]
        if "failed" in step:
            rows.append([*start, step["failed"], *[""] * 6])
            continue
        schedule = context.params.resolve(step["run"], step["profile"]).settings.schedule
        whole = step["step_ms"] * schedule.groups
        share = step["contrastive_share"] if step["loss"] != "ce" else None
        start[-1] = f"{step['batch']} x {'x'.join(map(str, step['crop']))}"
        cells = [f"{step['step_ms']:.1f}", f"{step['images_per_s']:.1f}", f"{1000 / whole:.2f}"]
        cells += [f"{whole * schedule.steps / 3.6e6:.1f}", f"{step['peak_bytes'] / 2**30:.2f}"]
        within = "" if share is None else verdict(share <= CONTRASTIVE_SHARE)
        rows.append([*start, *cells, "" if share is None else f"{share:.1%}", within])
    text = (
        "Images of one GPU (a group); a whole step on one GPU counts as so many groups, one after the other."
    )
    return [markdown_table(header, rows), text, hours(context)] if rows else []


def hours(context: Context) -> str:
    """Return the GPU-hours of every table, as `plan` has them."""
    profile = "mini" if context.dry_run else "paper"
    sums = []
    for table in TABLES:
        settings = [context.params.resolve(run, profile).settings for run in table_runs(table)]
        costs = plan.costs(settings, context.device)
        known = [cost.hours for cost in costs if cost.hours is not None]
        sums.append([table, len(costs), f"{sum(known):.0f}" if len(known) == len(costs) else "unknown"])
    return markdown_table(["table", "runs", "GPU-hours"], sums)


def small(context: Context) -> list[str]:
    """Return the scores of profile small's trainings."""
    blocks = []
    for entry in context.results.get("small", {}).values():
        result = entry.get("result", {})
        rows = [[name, _number(score)] for name, score in sorted(result.get("scores", {}).items())]
        blocks.append(markdown_table(["training", "mIoU ss"], rows))
        blocks.append(markdown_list("Failed:", [f"{k}: {v}" for k, v in result.get("failed", {}).items()]))
    return blocks


def training(context: Context) -> list[str]:
    """Return what the short trainings showed."""
    lines = []
    for name, entry in context.results.get("training", {}).items():
        result = entry.get("result", {})
        if "fell" in result:
            ends = f"{result['losses'][0]:.3f} to {result['losses'][-1]:.3f}"
            lines.append(f"{name}: loss {ends} in {len(result['losses'])} steps, {result['seconds']:.1f} s")
        elif "bit_identical" in result:
            lines.append(
                f"{name}: killed {result['killed']}, same losses bit for bit {result['bit_identical']}"
            )
        elif "one" in result:
            first = abs(result["one"][0] - result["two"][0]) / abs(result["one"][0])
            apart = result["largest_relative_difference"]
            lines.append(f"{name}: losses {first:.1e} apart at the first step, at most {apart:.1e} later")
    return [markdown_list("Losses of all steps are in the state file.", lines)]


def inference(context: Context) -> list[str]:
    """Return images per second beside the plain loop."""
    keys = ["run", "image", "mode", "method"]
    rows = [
        [
            *(row[key] for key in keys),
            f"{row['images_per_s']:.3g}",
            f"{row['speed_up']:.2f}",
            f"{row['agreement']:.2%}",
        ]
        for result in context.measured("inference")
        for row in result.get("rows", ())
    ]
    return [markdown_table([*keys, "images/s", "speed-up", "same pixels"], rows)]


def feed(context: Context) -> list[str]:
    """Return whether the loader reads as fast as the fastest step of a dataset trains."""
    rows = []
    for result in context.measured("feed"):
        own = [s for s in step_rows(context) if s["row"].startswith(result["dataset"]) and "failed" not in s]
        fastest = max((step["images_per_s"] for step in own), default=None)
        rate = result["images_per_s"]
        enough = verdict(None if fastest is None else rate >= fastest)
        rows.append([result["dataset"], result["workers"], f"{rate:.1f}", _number(fastest), enough])
    header = ["dataset", "processes", "loader images/s", "fastest step images/s", "fed"]
    return [markdown_table(header, rows)]


def verdict(hit: bool | None) -> str:
    """Return a verdict as a word."""
    return {None: "not measured", True: "hit", False: "missed"}[hit]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"
