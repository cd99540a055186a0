"""Speed and memory of the contrastive loss, beside the dense formula it replaces.

Sections: `self` (anchors against themselves), `cross` (one scale against another), `sampling` (choosing
pixels, against a loop over image and class) and `whole` (all terms of a batch of 512 x 1024 crops, with
sampling). Competitors: the dense formula, the same under torch.compile, and the same in checkpointed chunks
of rows. The share of a training step is measured by benchmarks/step.py.

    python benchmarks/loss.py                 # everything, on the GPU if there is one
    python benchmarks/loss.py --quick         # small sizes, a minute on a laptop
    python benchmarks/loss.py --sections self --rows 10000 --methods dense ours

A case that would need more than the free memory (on a CPU 80 % of it), or more than --limit seconds for one
pass judging by the smaller case before it, is reported and not run. Writes loss-<hardware>.json and .md to
benchmarks/results.
"""

import argparse
import ctypes
import gc
import os
import platform
import re
import statistics
import time
from collections.abc import Callable
from functools import cache, cached_property, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mscs.losses import MultiScaleContrastiveLoss, contrastive_loss
from mscs.losses.sampling import Selection, draw_balanced, gather_pixels, select
from mscs.results import write_json, write_text

ROWS = (500, 2_000, 10_000, 16_384, 32_768, 65_536, 98_304)
CROSS = ((10_000, 1_024), (10_000, 4_096), (65_536, 1_024), (65_536, 4_096))
CHANNELS, CLASSES, CHUNK = 256, 19, 1024
# N x M matrices alive at the peak: counted operation by operation; measured at N = 10,000 when compiled
DENSE_MATRICES, COMPILED_MATRICES = 8.1, 2.1
SECTIONS = ("self", "cross", "sampling", "whole")
Sets = list[Tensor]


def dense(x: Tensor, lx: Tensor, y: Tensor | None = None, ly: Tensor | None = None) -> Tensor:
    """The formula as printed, on whole matrices; temperature 0.1."""
    x = F.normalize(x, dim=1)
    columns, labels = (x, lx) if y is None else (F.normalize(y, dim=1), ly)
    return _dense_rows(x, lx, columns, labels, 0 if y is None else -1) / len(x)


def _dense_rows(x: Tensor, lx: Tensor, y: Tensor, ly: Tensor, first: int) -> Tensor:
    """Sum over rows; row i is column first + i, and not its own positive, unless first is negative."""
    s = x @ y.T / 0.1
    same = (lx[:, None] == ly).to(s)
    positive = same
    if first >= 0:
        own = torch.arange(first, first + len(x), device=x.device)[:, None]
        positive = same * (own != torch.arange(len(y), device=x.device))
    exponential = s.exp()
    negatives = (exponential * (1 - same)).sum(dim=1, keepdim=True)
    log_probability = s - (exponential + negatives).log()
    return -((positive * log_probability).sum(dim=1) / positive.sum(dim=1).clamp(min=1)).sum()


def chunked(x: Tensor, lx: Tensor, y: Tensor | None = None, ly: Tensor | None = None) -> Tensor:
    """The same in chunks of rows whose matrices are computed again in the backward pass."""
    x = F.normalize(x, dim=1)
    columns, labels = (x, lx) if y is None else (F.normalize(y, dim=1), ly)
    total = x.new_zeros(())
    for first in range(0, len(x), CHUNK):
        part = slice(first, first + CHUNK)
        offset = first if y is None else -1
        total = total + checkpoint(
            _dense_rows, x[part], lx[part], columns, labels, offset, use_reentrant=False
        )
    return total / len(x)


class Machine:
    """The device, its clock, its free memory and its rate of matrix products."""

    def __init__(self, name: str) -> None:
        self.device = torch.device(name)
        self.cuda = self.device.type == "cuda"
        self.label = torch.cuda.get_device_name() if self.cuda else _cpu_name()

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def free_bytes(self) -> int:
        if self.cuda:
            return torch.cuda.mem_get_info()[0]
        fields = dict(re.findall(r"(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text()))
        return int(fields["MemAvailable"]) * 1024

    def start_peak(self) -> int:
        """Forget earlier peaks; return the bytes in use now."""
        gc.collect()
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            return torch.cuda.memory_allocated()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return self.peak()

    def peak(self) -> int:
        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024

    @cached_property
    def rates(self) -> dict[str, float]:
        """FLOP/s of matrix products by dtype."""
        found = {"fp32": self.matmul_rate(torch.float32)}
        return found | ({"fp16": self.matmul_rate(torch.float16)} if self.cuda else {})

    @property
    def usable_bytes(self) -> float:
        """What a case may need; a GPU that runs out says so, a CPU's machine stops working."""
        return self.free_bytes() * (1.0 if self.cuda else 0.8)

    def matmul_rate(self, dtype: torch.dtype) -> float:
        """FLOP/s of a large product, the best of ten."""
        size = 8192 if self.cuda else 1536
        a = torch.randn(size, size, device=self.device, dtype=torch.float32).to(dtype)
        best = float("inf")
        for _ in range(10):
            start = self.now()
            a @ a
            best = min(best, self.now() - start)
        return 2 * size**3 / best


def _cpu_name() -> str:
    found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{found[1] if found else platform.machine()}, {torch.get_num_threads()} threads"


def measure(machine: Machine, run: Callable[[], Tensor], repeats: int, seconds: float) -> dict[str, float]:
    """Return median milliseconds of forward, backward and both, and extra peak bytes of a first pass."""
    run().backward()  # compiles, and fills caches
    before = machine.start_peak()
    run().backward()
    machine.now()
    extra = machine.peak() - before
    forward, both = [], []
    end = time.perf_counter() + seconds
    while not both or (len(both) < repeats and time.perf_counter() < end):
        start = machine.now()
        loss = run()
        middle = machine.now()
        loss.backward()
        both.append(machine.now() - start)
        forward.append(middle - start)
    backward = [b - f for b, f in zip(both, forward, strict=True)]
    times = {"forward": forward, "backward": backward, "both": both}
    result = {f"{name}_ms": 1e3 * statistics.median(values) for name, values in times.items()}
    return result | {"extra_bytes": extra, "passes": len(both)}


def _rows(machine: Machine, count: int, seed: int) -> Sets:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, CHANNELS, generator=generator).to(machine.device).requires_grad_()
    return [x, torch.arange(count, device=machine.device) % CLASSES]


@cache
def compiled_dense() -> Callable[..., Tensor]:
    return torch.compile(dense, dynamic=False)


def competitors(machine: Machine) -> dict[str, Callable[..., Tensor]]:
    """Return every way to compute a term, by name."""
    ways: dict[str, Callable[..., Tensor]] = {
        "dense": dense,
        "dense, compiled": lambda *sets: compiled_dense()(*sets),
        "chunked, checkpointed": chunked,
    }
    if machine.cuda or os.environ.get("TRITON_INTERPRET") == "1":
        for grade in ("fp32", "fp16"):
            ways[f"ours, {grade} grade"] = partial(contrastive_loss, backend="triton", precision=grade)
    else:
        ways["ours"] = contrastive_loss
    return ways


def estimate_bytes(method: str, rows: int, columns: int) -> float:
    """Peak of one pass: the dense formula's matrices, or some copies of the rows."""
    copies = 12 * 4 * CHANNELS * (rows + columns)
    if method.startswith("dense"):
        matrices = COMPILED_MATRICES if "compiled" in method else DENSE_MATRICES
        return matrices * 4 * rows * columns + copies
    return copies + (DENSE_MATRICES * 4 * CHUNK * columns if method.startswith("chunked") else 0)


def bench_terms(machine: Machine, shapes: list[tuple[int, int | None]], options: argparse.Namespace) -> list:
    """Measure each method on each shape, smallest first; columns None is the within-scale term."""
    ways = {k: w for k, w in competitors(machine).items() if _wanted(k, options.methods)}
    results, last = [], {}
    for rows, columns in shapes:
        for method, way in ways.items():
            case = {"rows": rows, "columns": columns or rows, "method": method}
            pairs = rows * (columns or rows)
            need, free = estimate_bytes(method, rows, columns or rows), machine.usable_bytes
            expected = last[method][1] * pairs / last[method][0] if method in last else 0.0
            if need > free:
                case["skipped"] = f"needs {need / 2**30:.1f} GiB of {free / 2**30:.1f} free"
            elif expected > options.limit:
                case["skipped"] = f"expected to take {expected:.0f} s"
            else:
                sets = _rows(machine, rows, 0) + ([] if columns is None else _rows(machine, columns, 1))
                try:
                    case |= measure(machine, lambda w=way, s=sets: w(*s), options.repeats, options.seconds)
                    flops = 6 * pairs * CHANNELS / (case["both_ms"] / 1e3)
                    rate = machine.rates["fp16" if machine.cuda and "ours" in method else "fp32"]
                    case |= {"flops": flops, "share_of_matmul": flops / rate}
                    last[method] = pairs, case["both_ms"] / 1e3
                except (RuntimeError, torch.OutOfMemoryError) as error:
                    case["skipped"] = f"failed: {str(error).splitlines()[0][:90]}"
                if "compiled" in method:
                    torch.compiler.reset()
            results.append(case)
            print(_line(case), flush=True)
    return results


def _wanted(method: str, wanted: list[str]) -> bool:
    """Return whether a method is asked for by its name; `ours` stands for both grades."""
    return not wanted or any(method == name or method.startswith(f"{name}, fp") for name in wanted)


def _line(case: dict) -> str:
    size = " x ".join(str(case[key]) for key in ("rows", "columns") if key in case)
    name = f"{size:>16} {case['method']:<40}"
    if "skipped" in case:
        return f"{name} not run: {case['skipped']}"
    text = f"{name} {case['both_ms']:10.2f} ms"
    return text + (f" {case['extra_bytes'] / 2**20:9.1f} MiB" if "extra_bytes" in case else "")


def label_map(machine: Machine, images: int, height: int, width: int) -> Tensor:
    """Images of blocks of 19 classes, rarer ones in fewer blocks, none absent."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(CLASSES, (images, height // 8, width // 8), generator=generator)
    coarse = blocks.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)
    return coarse.to(machine.device)


def loop_choose(labels: Tensor) -> list[tuple[int, int, Tensor]]:
    """Choose equally many pixels per image and class, set by set."""
    flat = labels.flatten(1)
    member = flat[:, :, None] == torch.arange(CLASSES, device=flat.device)
    counts = member.sum(dim=1)
    present = (counts >= 5).nonzero().tolist()
    views = min(2500, 10_000 // len(present), *(int(counts[b, c]) for b, c in present))
    chosen = []
    for image, label in present:
        pixels = member[image, :, label].nonzero().squeeze(1)
        order = torch.randperm(len(pixels)).to(pixels.device)
        chosen.append((image, label, pixels[order[:views]]))
    return chosen


def loop_gather(features: Tensor, chosen: list[tuple[int, int, Tensor]]) -> Tensor:
    """Collect the chosen rows, set by set."""
    flat = features.flatten(2)
    return torch.cat([flat[image, :, pixels].T for image, _, pixels in chosen])


def sort_choose(labels: Tensor) -> Selection:
    """Choose the same number of pixels by our sort."""
    return select([draw_balanced(labels, 255, 5, 2500, 10_000)])[0]


def profile(machine: Machine, method: str, rows: int) -> list[dict]:
    """Return what one pass forward and backward spends its time on: kernels, slowest first."""
    way, sets = competitors(machine)[method], _rows(machine, rows, 0)
    way(*sets).backward()
    with torch.profiler.profile() as trace:
        way(*sets).backward()
        machine.now()
    kind = "self_device_time_total" if machine.cuda else "self_cpu_time_total"
    found = sorted(trace.key_averages(), key=lambda event: getattr(event, kind), reverse=True)[:12]
    return [
        {"kernel": event.key[:80], "calls": event.count, "ms": getattr(event, kind) / 1e3} for event in found
    ]


def bench_sampling(machine: Machine, options: argparse.Namespace) -> list:
    """Time choosing pixels of a 2 x 128 x 256 map, alone and with the gather of their features."""
    labels = label_map(machine, 2, 128, 256)
    features = torch.randn(2, CHANNELS, 128, 256, device=machine.device)
    ways: dict[str, Callable[[], object]] = {
        "indices, loop": lambda: loop_choose(labels),
        "indices, ours": lambda: sort_choose(labels),
        "with gather, loop": lambda: loop_gather(features, loop_choose(labels)),
        "with gather, ours": lambda: gather_pixels(features, sort_choose(labels).positions),
    }
    results = []
    for method, way in ways.items():
        way()
        times = []
        for _ in range(max(20, options.repeats)):
            start = machine.now()
            way()
            times.append(machine.now() - start)
        results.append({"method": method, "both_ms": 1e3 * statistics.median(times)})
        print(_line(results[-1]), flush=True)
    return results


def bench_whole(machine: Machine, options: argparse.Namespace) -> list:
    """Measure the whole loss at strides 4 to 32 of some crops, balanced and with all pixels."""
    height, width = (128, 256) if options.quick else (512, 1024)
    labels = label_map(machine, options.crops, height, width)
    features = [
        torch.randn(
            options.crops, CHANNELS, height // s, width // s, device=machine.device, requires_grad=True
        )
        for s in (4, 8, 16, 32)
    ]
    results = []
    for sampling in ("balanced", "all"):
        for method, backend in (("dense", "reference"), ("ours", "auto")):
            loss = MultiScaleContrastiveLoss(sampling=sampling, backend=backend)
            case: dict = {"method": f"{sampling}, {method}"}
            rows = 10_000 if sampling == "balanced" else features[0][:, 0].numel()
            need = estimate_bytes(method, rows, rows)
            if need > machine.usable_bytes:
                case["skipped"] = f"needs {need / 2**30:.1f} GiB"
            else:
                case |= measure(
                    machine, lambda m=loss: m(features, labels).total, options.repeats, options.seconds
                )
            results.append(case)
            print(_line(case), flush=True)
    return results


def markdown(report: dict) -> str:
    """Return the report as tables."""
    lines = ["# The contrastive loss: speed and memory", ""]
    lines += [f"- {key}: {value}" for key, value in report["setting"].items()]
    for section, cases in report["sections"].items():
        lines += ["", f"## {section}", ""]
        if section in ("self", "cross"):
            lines += [
                "| rows | columns | method | forward ms | backward ms | both ms | extra MiB | GFLOP/s "
                "| of matmul rate | times faster | times less memory |",
                "| ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
            ]
            lines += [_term_row(case, cases) for case in cases]
        else:
            lines += ["| case | both ms | extra MiB |", "| --- | ---: | ---: |"]
            for case in cases:
                extra = f"{case['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in case else ""
                time_text = case.get("skipped") or f"{case['both_ms']:.2f}"
                lines.append(f"| {case['method']} | {time_text} | {extra} |")
    return "\n".join(lines) + "\n"


def _term_row(case: dict, cases: list[dict]) -> str:
    head = f"| {case['rows']} | {case['columns']} | {case['method']} |"
    if "skipped" in case:
        return f"{head} {case['skipped']} |" + " |" * 7
    same = [c for c in cases if (c["rows"], c["columns"]) == (case["rows"], case["columns"])]
    base = next((c for c in same if c["method"] == "dense" and "skipped" not in c), None)
    faster = f"{base['both_ms'] / case['both_ms']:.1f}" if base else ""
    smaller = f"{base['extra_bytes'] / max(1, case['extra_bytes']):.0f}" if base else ""
    return (
        f"{head} {case['forward_ms']:.2f} | {case['backward_ms']:.2f} | {case['both_ms']:.2f} "
        f"| {case['extra_bytes'] / 2**20:.1f} | {case['flops'] / 1e9:.1f} "
        f"| {100 * case['share_of_matmul']:.0f} % | {faster} | {smaller} |"
    )


def write(report: dict, folder: Path, name: str) -> None:
    write_json(folder / f"{name}.json", report)
    write_text(folder / f"{name}.md", markdown(report))
    print(f"wrote {folder / name}.json and .md")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--rows", nargs="+", type=int, help="sizes of the section `self`")
    parser.add_argument("--crops", type=int, default=2, help="of the section `whole` (default: 2)")
    parser.add_argument("--methods", nargs="+", default=[], help="as printed; ours: both grades; default all")
    parser.add_argument("--repeats", type=int, help="most passes per case (CUDA 50, CPU 5)")
    parser.add_argument("--seconds", type=float, default=20.0, help="time after which no further pass starts")
    parser.add_argument(
        "--limit", type=float, default=60.0, help="longest expected pass that is run, seconds"
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--tag", help="hardware part of the file names; default from the device")
    return parser.parse_args(arguments)


def main() -> None:
    options = parse()
    machine = Machine(options.device)
    options.repeats = options.repeats or (50 if machine.cuda else 5)
    rows = options.rows or ([500, 1500] if options.quick else list(ROWS))
    cross = [(1500, 400)] if options.quick else list(CROSS)
    runs: dict[str, Callable[[], list]] = {
        "self": lambda: bench_terms(machine, [(count, None) for count in rows], options),
        "cross": lambda: bench_terms(machine, cross, options),
        "sampling": lambda: bench_sampling(machine, options),
        "whole": lambda: bench_whole(machine, options),
    }
    setting = {
        "hardware": machine.label,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "matmul rate": ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in machine.rates.items()),
        "workload": f"{CHANNELS} channels, {CLASSES} classes, temperature 0.1, float32 input",
    }
    tag = options.tag or re.sub(r"[^a-z0-9]+", "-", machine.label.lower()).strip("-")
    name = f"loss-{tag}" + ("-quick" if options.quick else "")
    sections: dict[str, list] = {}
    for section in options.sections:
        print(f"-- {section}", flush=True)
        sections[section] = runs[section]()
        # after each section: an interruption loses only the one it hits
        write({"setting": setting, "sections": sections}, options.out, name)


if __name__ == "__main__":
    main()
