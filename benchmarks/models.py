"""Size, speed and memory of the paper's networks, beside the nearest networks of other libraries.

Every row of the supplement's Tables 4 to 7 is measured at its crop and at its images per GPU (the batch over
four GPUs): parameters, FLOPs of one image's forward pass, time of a forward pass in evaluation and of a
training step (forward, cross-entropy, backward), and peak memory of the latter. Each measurement runs in a
process of its own, so that peaks do not mix and an exhausted memory ends one row only.

    python benchmarks/models.py                      # all rows, on the GPU if there is one
    python benchmarks/models.py --quick              # an eighth of the crop's sides, two images
    python benchmarks/models.py --rows cadis --libraries mscs torchvision

Writes models.json and models.md to benchmarks/results.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
GPUS = 4  # the paper's
TASKS = {"cadis": 3}
SWIN = "swin_{}_patch4_window7_224"
# model of params.yaml: the nearest (library, constructor, encoder) elsewhere
PEERS = {
    "hrnet-hr48": [("smp", "FPN", "tu-hrnet_w48")],
    "ocrnet-hr48": [("smp", "FPN", "tu-hrnet_w48")],
    "ocrnet-r50": [("torchvision", "fcn_resnet50", "")],
    "deeplabv3-r101": [("torchvision", "deeplabv3_resnet101", ""), ("smp", "DeepLabV3", "resnet101")],
    "upernet-r101": [("smp", "UPerNet", "resnet101")],
    "upernet-swint": [("smp", "UPerNet", "tu-" + SWIN.format("tiny"))],
    "upernet-swins": [("smp", "UPerNet", "tu-" + SWIN.format("small"))],
    "upernet-swinb": [("smp", "UPerNet", "tu-" + SWIN.format("base"))],
    "upernet-swinb22k": [("smp", "UPerNet", "tu-" + SWIN.format("base"))],
    "upernet-swinl22k": [("smp", "UPerNet", "tu-" + SWIN.format("large"))],
}
# Table 2(a): HRNet-W48 on Cityscapes crops, two images per GPU; peak GB of a 24 GB GPU as printed
TABLE_2A = {
    "cross-entropy only": (None, None, "-"),
    "one scale, sampled": ("concat", {"scale_weights": (1.0,), "cross_pairs": ()}, "7.4"),
    "four scales, two pairs, sampled": ("backbone", {}, "9.7"),
    "one scale, all pixels": (
        "concat",
        {"scale_weights": (1.0,), "cross_pairs": (), "sampling": "all"},
        "14.2",
    ),
    "four scales, two pairs, all pixels": ("backbone", {"sampling": "all"}, "OOM"),
}


def rows_of_the_paper(patterns):
    """Yield one job per row of Tables 4 to 7 with a pattern in its name, and one per peer of its model."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    from mscs.datasets import label_set

    for name, schedule in params["schedules"].items():
        dataset, model = name.split("-", 1)
        if not any(pattern in name for pattern in patterns):
            continue
        entry = params["models"][model]
        height, width = schedule["crop_size"]
        job = {
            "row": name,
            "classes": label_set(dataset, TASKS.get(dataset)).num_classes,
            "crop": [height + -height % 32, width + -width % 32],
            "batch": schedule["batch_size"] // GPUS,
        }
        own = {"library": "mscs", "network": f"{entry['model']} {entry['backbone']}"}
        yield job | own | {"build": [entry["model"], entry["backbone"], entry["model_options"]]}
        for library, network, encoder in PEERS.get(model, []):
            yield job | {
                "library": library,
                "network": f"{network} {encoder}".strip(),
                "build": [network, encoder, {}],
            }


def rows_of_table_2a():
    for name, (projector, loss, printed) in TABLE_2A.items():
        yield {
            "row": f"Table 2(a): {name}",
            "library": "mscs",
            "network": "hrnet hrnet_w48",
            "build": ["hrnet", "hrnet_w48", {"projector": projector}],
            "classes": 19,
            "crop": [512, 1024],
            "batch": 2,
            "loss": loss,
            "printed_gb": printed,
        }


def build(job):
    name, second, options = job["build"]
    if job["library"] == "mscs":
        from mscs.models import build_model

        return build_model(name, second, job["classes"], **options)
    if job["library"] == "torchvision":
        from torchvision.models import segmentation

        constructor = getattr(segmentation, name)
        return constructor(weights=None, weights_backbone=None, num_classes=job["classes"])
    import segmentation_models_pytorch as smp

    options = {"img_size": tuple(job["crop"])} if "swin" in second else {}
    if name == "UPerNet":
        options["decoder_channels"] = 512  # as in the paper; the library's default is 256
    return getattr(smp, name)(second, encoder_weights=None, classes=job["classes"], **options)


def logits_of(output):
    if isinstance(output, dict):  # torchvision
        return output["out"], output.get("aux")
    return (output.logits, output.aux_logits) if hasattr(output, "logits") else (output, None)


def count_flops(job):
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with torch.device("meta"):
            model, image = build(job).eval(), torch.empty(1, 3, *job["crop"])
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(image)
    except NotImplementedError:  # an operator without shapes-only version
        return None
    return counter.get_total_flops()


def training_loss(job, output, labels):
    import torch
    from torch.nn import functional as F

    logits, aux = logits_of(output)
    loss = F.cross_entropy(logits.float(), labels)
    if aux is not None:
        loss = loss + 0.4 * F.cross_entropy(aux.float(), labels)
    if job.get("loss") is not None:
        from mscs.losses import MultiScaleContrastiveLoss

        contrastive = MultiScaleContrastiveLoss(**job["loss"])
        generator = torch.Generator(labels.device).manual_seed(0)
        loss = loss + contrastive(output.embeddings, labels, generator).total
    return loss


def timed(function, repeats, synchronize):
    times = []
    for _ in range(repeats + 1):  # the first is warm-up
        start = time.perf_counter()
        function()
        synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def measure(job, repeats, precision):
    """Return the measurements of one job; runs in a process of its own."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    synchronize = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    flops = count_flops(job)
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = build(job).to(device, memory_format=torch.channels_last)
    projectors = sum(p.numel() for n, p in model.named_parameters() if n.startswith("projectors."))
    images = torch.randn(job["batch"], 3, *job["crop"], device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    # blocks of 32 pixels of one class: a number of classes per image near that of street scenes
    coarse = torch.randint(job["classes"], (job["batch"], 1, *(side // 32 for side in job["crop"])))
    labels = torch.nn.functional.interpolate(coarse.float(), job["crop"])[:, 0].long().to(device)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")

    def forward():
        with torch.no_grad(), autocast:
            model(images)

    def step():
        model.zero_grad(set_to_none=True)
        with autocast:
            output = model(images)
        training_loss(job, output, labels).backward()

    model.eval()
    forward_s = timed(forward, repeats, synchronize)
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train_s = timed(step, repeats, synchronize)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    else:
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return {
        "parameters": sum(p.numel() for p in model.parameters()) - projectors,
        "flops": flops,
        "forward_s": forward_s,
        "train_s": train_s,
        "peak_gb": peak / 1e9,
    }


def run_job(job, arguments):
    """Measure `job` in a new process; a failure becomes the row's note."""
    command = [sys.executable, __file__, "--job", json.dumps(job)]
    command += ["--repeats", str(arguments.repeats), "--precision", arguments.precision]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    if result.returncode == 0:
        return job | json.loads(result.stdout.splitlines()[-1])
    out_of_memory = (
        result.returncode == -9 or "out of memory" in result.stderr or "OutOfMemory" in result.stderr
    )
    last = result.stderr.strip().splitlines()[-1] if result.stderr.strip() else f"exit {result.returncode}"
    return job | {"failed": "out of memory" if out_of_memory else last[:200]}


def machine(precision):
    import torch

    from mscs.provenance import machine as here

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{here()['cpu']}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "precision": precision,
    }


def table(results):
    lines = [
        "| Row | Network | Images x crop | Params (M) | GFLOPs/image | Forward (s) | Step (s) | Peak (GB) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        size = f"{r['batch']} x {r['crop'][0]}x{r['crop'][1]}"
        start = f"| {r['row']} | {r['library']}: {r['network']} | {size} |"
        if "failed" in r:
            lines.append(f"{start} {r['failed']} | | | | |")
            continue
        flops = "-" if r["flops"] is None else f"{r['flops'] / 1e9:.1f}"
        peak = f"{r['peak_gb']:.2f}" + (f" (printed: {r['printed_gb']})" if "printed_gb" in r else "")
        times = f"{r['forward_s']:.3f} | {r['train_s']:.3f}"
        lines.append(f"{start} {r['parameters'] / 1e6:.2f} | {flops} | {times} | {peak} |")
    return "\n".join(lines)


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    os.replace(temporary, path)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="an eighth of each side, two images, one repeat")
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows whose name contains one of these")
    parser.add_argument("--libraries", nargs="+", default=["mscs", "torchvision", "smp"])
    parser.add_argument("--table-2a", action="store_true", help="measure Table 2(a) without a GPU too")
    parser.add_argument("--repeats", type=int, default=3, help="median of so many, after one warm-up")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="the paper: fp32")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def available(libraries):
    from importlib.util import find_spec

    modules = {"mscs": "mscs", "torchvision": "torchvision", "smp": "segmentation_models_pytorch"}
    for library in libraries:
        if find_spec(modules[library]):
            yield library
        else:
            print(f"skipping {library}: {modules[library]} is not installed", file=sys.stderr)


def main():
    arguments = parse()
    if arguments.job:
        print(json.dumps(measure(json.loads(arguments.job), arguments.repeats, arguments.precision)))
        return
    import torch

    libraries = set(available(arguments.libraries))
    jobs = [job for job in rows_of_the_paper(arguments.rows) if job["library"] in libraries]
    if arguments.table_2a or torch.cuda.is_available():
        jobs += rows_of_table_2a()
    if arguments.quick:
        arguments.repeats = 1
        for job in jobs:
            job["crop"] = [max(64, side // 8 // 32 * 32) for side in job["crop"]]
            job["batch"] = 2
    results = []
    for job in jobs:
        results.append(run_job(job, arguments))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        facts = {"machine": machine(arguments.precision), "quick": arguments.quick, "results": results}
        write(arguments.output / "models.json", json.dumps(facts, indent=1) + "\n")
        header = (
            f"Measured by benchmarks/models.py on {facts['machine']['device']}, torch {torch.__version__}, "
        )
        header += f"{arguments.precision}, repeats after a warm-up: {arguments.repeats}"
        header += f"{', quick' if arguments.quick else ''}.\n\n"
        write(arguments.output / "models.md", header + table(results) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
