"""Images per second and core of the whole training transform, from file to normalised tensor.

Four ways, the same random choices, one thread: `plain` does what the authors' code does (PIL reads the file
and resizes the whole image, then crops; torchvision's colour jitter on PIL images), `torchvision v2` does the
same on tensors, `mscs` resamples only the pixels under the crop, `mscs cached` does so from the decoded files
that `mscs data prepare --cache` writes. Files are drawn at random in the sizes of Cityscapes (1024x2048 PNG
of about 4 MB, crop 512x1024) and ADE20K (512x683 JPEG, crop 512x512). Decoders are timed alone, too.

    python benchmarks/data.py
    python benchmarks/data.py --quick --out /tmp/x
    python benchmarks/data.py --feed 40       # cores that a GPU needs which trains on 40 images/s

Writes data.json and data.md to benchmarks/results. Needs an idle machine: 2 cores are enough.
"""

import argparse
import importlib.util
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import functional
from torchvision.transforms.v2 import functional as functional_v2

from mscs.datasets import build_dataset, label_set
from mscs.datasets.prepare import build_cache, cache_bytes
from mscs.datasets.verify import verify
from mscs.loader import train_loader
from mscs.provenance import machine, package_versions
from mscs.results import write_json, write_text
from mscs.transforms import IMAGENET_MEAN, IMAGENET_STD, JITTER, TrainTransform

TARGETS = {("cityscapes", "mscs"): 2.5, ("cityscapes", "mscs cached"): 6.0, ("ade20k", "mscs"): 2.5}
PLAIN = "plain (PIL)"


@dataclass(frozen=True)
class Case:
    """Files and crop of one dataset."""

    dataset: str
    size: tuple[int, int]
    crop: tuple[int, int]
    noise: float
    """Standard deviation of the pixel noise; sets how many bytes a file has."""


CASES = (Case("cityscapes", (1024, 2048), (512, 1024), 3.5), Case("ade20k", (512, 683), (512, 512), 5.0))


def draw_geometry(rng, size, crop):
    """Yield the random choices of the paper's transform: flip, resized size, padding, then crop corners."""
    yield rng.random() < 0.5
    scale, aspect = rng.uniform(0.5, 2.0), rng.uniform(0.9, 1.1)
    resized = int(size[0] * scale / aspect**0.5), int(size[1] * scale * aspect**0.5)
    yield resized
    missing = [max(0, c - r) for c, r in zip(crop, resized, strict=True)]
    yield [(b := int(rng.integers(m + 1)), m - b) for m in missing]
    while True:
        yield [int(rng.integers(r + m - c + 1)) for r, m, c in zip(resized, missing, crop, strict=True)]


def is_mixed(label):
    """Tell whether a crop shows two classes and none covers three quarters of what is labelled."""
    values, counts = np.unique(np.asarray(label), return_counts=True)
    counts = counts[values != 255]
    return len(counts) > 1 and counts.max() < 0.75 * counts.sum()


def draw_jitter(rng):
    """Return the order of the four colour steps and their factors."""
    order = rng.permutation(4)
    return order, [rng.uniform(*bounds) for bounds in JITTER]


def plain_transform(image, label, rng, crop, jitter=True):
    """Transform whole uint8 arrays with PIL and torchvision; return the image and label tensors."""
    image, label = Image.fromarray(image), Image.fromarray(label)
    choices = draw_geometry(rng, (image.height, image.width), crop)
    if next(choices):
        image, label = functional.hflip(image), functional.hflip(label)
    height, width = next(choices)
    image = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
    label = np.asarray(label.resize((width, height), Image.Resampling.NEAREST))
    around = next(choices)
    if np.any(around):
        image, label = np.pad(image, (*around, (0, 0))), np.pad(label, around, constant_values=255)
    for _ in range(10):
        top, left = next(choices)
        cropped = label[top : top + crop[0], left : left + crop[1]]
        if is_mixed(cropped):
            break
    image = Image.fromarray(image[top : top + crop[0], left : left + crop[1]])
    if jitter:
        image = plain_jitter(image, rng, functional)
    tensor = functional.normalize(functional.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)
    return tensor, torch.from_numpy(cropped.astype(np.int64))


def plain_jitter(image, rng, library):
    """Apply the colour jitter of torchvision, on PIL images or tensors."""
    steps = (
        library.adjust_brightness,
        library.adjust_contrast,
        library.adjust_saturation,
        library.adjust_hue,
    )
    order, factors = draw_jitter(rng)
    for step in order:
        image = steps[step](image, factors[step])
    return image


def tensor_transform(image, label, rng, crop):
    """Transform uint8 tensors (3, H, W) and (1, H, W) with torchvision v2; same choices, same order."""
    image, label = tv_tensors.Image(image), tv_tensors.Mask(label)
    choices = draw_geometry(rng, image.shape[-2:], crop)
    if next(choices):
        image, label = functional_v2.horizontal_flip(image), functional_v2.horizontal_flip(label)
    size = list(next(choices))
    image, label = functional_v2.resize(image, size, antialias=True), functional_v2.resize(label, size)
    (top, bottom), (left, right) = next(choices)
    padding = [left, top, right, bottom]
    image, label = functional_v2.pad(image, padding), functional_v2.pad(label, padding, fill=255)
    for _ in range(10):
        corner = next(choices)
        cropped = functional_v2.crop(label, *corner, *crop)
        if is_mixed(cropped):
            break
    image = plain_jitter(functional_v2.crop(image, *corner, *crop), rng, functional_v2)
    image = functional_v2.to_dtype(image, torch.float32, scale=True)
    return functional_v2.normalize(image, IMAGENET_MEAN, IMAGENET_STD), cropped[0].long()


def draw_picture(case, rng, shrink):
    """Draw an image with detail at every scale, and a label of blobs."""
    height, width = (side // shrink for side in case.size)
    image = np.full((height, width, 3), 110, np.float32)
    for octave in range(3, 9):
        coarse = rng.normal(size=(max(2, height >> (9 - octave)), max(2, width >> (9 - octave)), 3))
        image += (
            cv2.resize(coarse.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
            * 40
            / octave
        )
    image += rng.normal(0, case.noise, image.shape)
    values = np.array([raw[0] for raw in label_set(case.dataset).raw_ids], np.uint8)
    blobs = rng.choice(values, (height // 40 + 1, width // 40 + 1))
    label = cv2.resize(blobs, (width, height), interpolation=cv2.INTER_NEAREST)
    return np.clip(image, 0, 255).astype(np.uint8), label


def write_files(case, root, number, shrink):
    """Write `number` training samples in the dataset's layout."""
    rng = np.random.default_rng(0)
    for i in range(number):
        image, label = draw_picture(case, rng, shrink)
        if case.dataset == "cityscapes":
            name = f"train/aachen/aachen_{i:06d}_000019"
            paths = f"leftImg8bit/{name}_leftImg8bit.png", f"gtFine/{name}_gtFine_labelIds.png"
        else:
            base, name = "ADEChallengeData2016", f"training/ADE_train_{i:08d}"
            paths = f"{base}/images/{name}.jpg", f"{base}/annotations/{name}.png"
        for path, pixels in zip(paths, (image, label), strict=True):
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / path, **({"quality": 92} if path.endswith("jpg") else {}))


def ways(case, root, crop):
    """Return, per way, a function of (sample index, generator) that goes from file to tensors."""
    dataset = build_dataset(case.dataset, "train", root)
    lookup = np.frombuffer(dataset.labels.lookup(), np.uint8)
    files = [(root / entry.image, root / entry.label) for entry in dataset.entries]
    transform = TrainTransform(crop_size=crop)

    def plain(i, rng):
        image, label = (Image.open(path) for path in files[i])
        return plain_transform(np.asarray(image.convert("RGB")), lookup[np.asarray(label)], rng, crop)

    table = torch.from_numpy(lookup.copy())

    def tensors(i, rng):
        image, label = (
            torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8) for path in files[i]
        )
        raw = decode_image(label, ImageReadMode.UNCHANGED)
        return tensor_transform(decode_image(image, ImageReadMode.RGB), table[raw.int()], rng, crop)

    return {PLAIN: plain, "torchvision v2": tensors, "mscs": lambda i, rng: transform(dataset[i], rng)}


def add_cache(case, root):
    """Build the cache of decoded images; return its size in bytes.

    Marked as generated, the training split alone is a whole dataset.
    """
    write_json(root / "generated.json", {"train": len(build_dataset(case.dataset, "train", root))})
    verify(case.dataset, root)
    size = cache_bytes(case.dataset, root)
    build_cache(case.dataset, root)
    return size


def decoders(path):
    """Return, per decoder, a function that decodes the image file at `path`."""
    data = path.read_bytes()
    array = np.frombuffer(data, np.uint8)
    tensor = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found = {
        "OpenCV": lambda: cv2.imdecode(array, cv2.IMREAD_COLOR_RGB),
        "PIL": lambda: np.asarray(Image.open(path).convert("RGB")),
        "torchvision.io": lambda: decode_image(tensor, ImageReadMode.RGB),
    }
    if path.suffix == ".png" and importlib.util.find_spec("imagecodecs"):
        codecs = importlib.import_module("imagecodecs")
        found["imagecodecs"] = lambda: codecs.png_decode(data)
    return found


def rates(functions, number, rounds):
    """Return images per second of each function, median over rounds that take turns."""
    seconds = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            for i in range(number):
                function(i, np.random.default_rng([turn, i]))
            if turn:  # the first round warms up
                seconds[name].append((time.perf_counter() - start) / number)
    return {name: 1 / statistics.median(times) for name, times in seconds.items()}


def loader_rate(case, workers, steps, shrink, batch_size=12):
    """Return images per second of the training loader with so many processes reading."""
    with tempfile.TemporaryDirectory() as folder:
        write_files(case, Path(folder), batch_size, shrink)
        dataset = build_dataset(case.dataset, "train", Path(folder))
        transform = TrainTransform(crop_size=tuple(side // shrink for side in case.crop))
        batches = train_loader(
            dataset, transform, batch_size=batch_size, seed=0, num_steps=2 * steps, num_workers=workers
        )
        for _ in range(steps):  # starts the processes, and fills what they read ahead
            next(batches)
        begun = time.perf_counter()
        read = sum(len(batch.images) for batch in batches)
        return read / (time.perf_counter() - begun)


def largest_difference(functions, number):
    """Return the share of values of `mscs` that are more than two levels off the plain path."""
    apart = 0.0
    for i in range(number):
        ours, labels = functions["mscs"](i, np.random.default_rng(i))
        plain, plain_labels = functions[PLAIN](i, np.random.default_rng(i))
        if not torch.equal(labels, plain_labels):
            raise AssertionError("labels differ from the plain path")
        levels = (ours - plain).abs() * torch.tensor(IMAGENET_STD)[:, None, None] * 255
        apart += float((levels > 2.5).float().mean()) / number
    return apart


def measure(case, number, rounds, shrink):
    """Return all numbers of one case."""
    crop = tuple(side // shrink for side in case.crop)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_files(case, root, number, shrink)
        functions = ways(case, root, crop)
        images = [root / entry.image for entry in build_dataset(case.dataset, "train", root).entries]
        sizes = [path.stat().st_size for path in images]
        alone = rates(
            {name: lambda i, rng, f=f: f() for name, f in decoders(images[0]).items()}, number, rounds
        )
        difference = largest_difference(functions, min(number, 4))
        cache = add_cache(case, root)
        cached, transform = build_dataset(case.dataset, "train", root), TrainTransform(crop_size=crop)
        functions["mscs cached"] = lambda i, rng: transform(cached[i], rng)
        result = rates(functions, number, rounds)
    return {
        "size": [side // shrink for side in case.size],
        "crop": list(crop),
        "megabytes_per_image": statistics.mean(sizes) / 1e6,
        "cache_megabytes_per_image": cache / number / 1e6,
        "images_per_second": result,
        "ratio_to_plain": {name: rate / result[PLAIN] for name, rate in result.items()},
        "decode_only_images_per_second": alone,
        "share_of_values_off_by_more_than_two_levels": difference,
    }


def report(results, feed):
    """Return the Markdown report."""
    lines = ["# Data pipeline: images per second and core", ""]
    for name, case in results["cases"].items():
        size, crop = ("x".join(map(str, case[key])) for key in ("size", "crop"))
        lines += [
            f"## {name}: {size}, {case['megabytes_per_image']:.2f} MB per file, crop {crop}",
            "",
            f"| way | images/s | ratio | target | cores for {feed:g} images/s |",
            "|---|---|---|---|---|",
        ]
        for way, rate in case["images_per_second"].items():
            target = TARGETS.get((name, way))
            lines.append(
                f"| {way} | {rate:.1f} | {case['ratio_to_plain'][way]:.2f} "
                f"| {f'>= {target}' if target else ''} | {feed / rate:.1f} |"
            )
        decode = ", ".join(f"{k} {v:.0f}" for k, v in case["decode_only_images_per_second"].items())
        apart = 100 * case["share_of_values_off_by_more_than_two_levels"]
        lines += [
            "",
            f"Decoding alone, images/s: {decode}. "
            f"Cache: {case['cache_megabytes_per_image']:.1f} MB per image. "
            f"Labels equal the plain path's; {apart:.2f}% of the image values are over two levels off.",
            "",
        ]
    host = results["machine"]
    lines.append(
        f"One thread; median of {results['rounds']} rounds of {results['images']} images; "
        f"{host['cpu']}, {host['cpus']} cores."
    )
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=12, help="files per dataset (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="quarter sides, few rounds: for a smoke test")
    parser.add_argument("--feed", type=float, default=20, help="images/s of a GPU (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    images, rounds, shrink = (4, 2, 4) if args.quick else (args.images, args.rounds, 1)
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    cases = {case.dataset: measure(case, images, rounds, shrink) for case in CASES}
    results = {"images": images, "rounds": rounds, "quick": args.quick, "cases": cases}
    results |= {"machine": machine(), "packages": package_versions()}
    write_json(args.out / "data.json", results)
    text = report(results, args.feed)
    write_text(args.out / "data.md", text)
    print(text)


if __name__ == "__main__":
    main()
