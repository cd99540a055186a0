"""Images per second of the evaluation, single-scale and multi-scale + flip, beside a plain loop.

The plain loop shows the network one view at a time (each window and each mirror image by itself) in the
default memory format. Ours batches the windows and mirror images of a picture and keeps channels last; on a
GPU it is measured in bfloat16 too. Both answer the same protocol: the share of pixels on which they agree is
printed. Weights and images are random, images of each dataset's usual size; no data is needed.

    python benchmarks/inference.py                 # on the GPU if there is one
    python benchmarks/inference.py --quick         # tiny networks and images, at most two of them
    python benchmarks/inference.py --runs cityscapes-hrnet-hr48-ce --images 3

Writes inference.json and inference.md (with --quick, inference-quick.*) to benchmarks/results.
"""

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mscs import build  # noqa: E402
from mscs.inference import Predictor  # noqa: E402
from mscs.params import load_params  # noqa: E402
from mscs.results import write_json, write_text  # noqa: E402

RUNS = (
    "cityscapes-hrnet-hr48-ce",
    "cityscapes-upernet-swins-ce",
    "ade20k-upernet-swins-ce",
    "pascal_context-ocrnet-hr48-ce",
    "cadis-ocrnet-r50-ce",
)
IMAGE_SIZES = {
    "cityscapes": (1024, 2048),
    "ade20k": (512, 683),
    "pascal_context": (375, 500),
    "cadis": (540, 960),
}


class PlainLoop(torch.nn.Module):
    """A network that takes its batch image by image."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        parts = [self.net(image[None]) for image in images]
        return parts[0]._replace(logits=torch.cat([part.logits for part in parts]))


def predictors(settings, net, device):
    """Yield (name, predictor); what came before is not used after the next is asked for."""
    protocol = build.protocol(settings)
    yield "plain loop", Predictor(PlainLoop(net), protocol, device=device, max_batch=1)
    ours = net.to(memory_format=torch.channels_last)
    yield "ours fp32", Predictor(ours, protocol, device=device, channels_last=True)
    if device == "cuda":
        bf16 = torch.bfloat16
        yield "ours bf16", Predictor(ours, protocol, device=device, channels_last=True, autocast=bf16)


def measure(predictor, images, multi_scale):
    """Return seconds per image (median; the first image warms up) and the predicted classes."""
    seconds, answers = [], []
    for image in [images[0], *images]:
        start = time.perf_counter()
        answers.append(predictor.scores(image, multi_scale=multi_scale).argmax(0).to("cpu", torch.uint8))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:]), torch.stack(answers[1:])


def measure_run(params, run, arguments, device):
    """Return one row per mode and predictor."""
    profile = "mini" if arguments.quick else "paper"
    modes = ["ss", "ms"] if params.resolve(run, profile).values["ms_scales"] else ["ss"]
    overrides = {"pretrained": False, "deterministic": False, "evaluation": modes}
    settings = params.resolve(run, profile, overrides).settings
    image_size = settings.data.image_size or IMAGE_SIZES[settings.data.name]
    build.apply_machine_settings(settings)
    classes = settings.data.labels.num_classes
    net = build.network(settings, classes, seed=0, projector=False).to(device)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*image_size, 3), dtype=np.uint8) for _ in range(arguments.images)]
    rows, plain = [], {}
    for name, predictor in predictors(settings, net, device):
        for mode in settings.evaluation.modes:
            seconds, answers = measure(predictor, images, mode == "ms")
            base, expected = plain.setdefault(mode, (seconds, answers))
            rows.append(
                {
                    "run": settings.run,
                    "image": "x".join(map(str, image_size)),
                    "mode": mode,
                    "method": name,
                    "images_per_s": 1 / seconds,
                    "speed_up": base / seconds,
                    "agreement": (answers == expected).double().mean().item(),
                }
            )
            print(" | ".join(texts(rows[-1])), flush=True)
    return rows


def texts(row):
    numbers = [f"{row['images_per_s']:.3g}", f"{row['speed_up']:.2f}", f"{100 * row['agreement']:.2f} %"]
    return [row["run"], row["image"], row["mode"], row["method"], *numbers]


def table(facts):
    header = ["run", "image", "mode", "method", "images/s", "speed-up", "same pixels"]
    lines = [
        f"Measured by benchmarks/inference.py on {facts['machine']}, torch {torch.__version__}, "
        f"{facts['images']} images each, median.",
        "",
        "| " + " | ".join(header) + " |",
        "|---" * len(header) + "|",
    ]
    return "\n".join([*lines, *("| " + " | ".join(texts(row)) + " |" for row in facts["results"])]) + "\n"


def parse(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="profile mini's networks and image sizes")
    parser.add_argument(
        "--runs", nargs="+", default=RUNS, help="default: five that differ in protocol or network"
    )
    parser.add_argument("--images", type=int, default=5, help="images measured per row (default: 5)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    return parser.parse_args(arguments)


def main():
    arguments = parse()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    machine = torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()
    if device == "cpu":
        machine += f", {torch.get_num_threads()} threads"
    if arguments.quick:
        arguments.images = min(arguments.images, 2)
    params = load_params(ROOT / "params.yaml")
    results = []
    for run in arguments.runs:
        results += measure_run(params, run, arguments, device)
        facts = {"machine": machine, "quick": arguments.quick, "images": arguments.images, "results": results}
        name = "inference-quick" if arguments.quick else "inference"
        write_json(arguments.output / f"{name}.json", facts)
        write_text(arguments.output / f"{name}.md", table(facts))


if __name__ == "__main__":
    main()
