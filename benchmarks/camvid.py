"""Take CamVid to a machine without a network, losslessly and in parts.

`pack` writes every picture as lossless WebP into zip files of at most --megabytes, each with the SHA-256 of
all decoded pixels; `unpack` writes PNG files again once all parts are there, and refuses pixels with another
digest. The files differ from the official ones, the pixels do not.

    python benchmarks/camvid.py pack data/camvid work/camvid
    python benchmarks/camvid.py unpack work/camvid data/camvid
"""

import argparse
import hashlib
import io
import json
import shutil
import sys
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mscs.datasets.registry import dataset_spec  # noqa: E402
from mscs.errors import MscsError, UsageError  # noqa: E402
from mscs.results import atomic_path, inside  # noqa: E402

DIGESTS = "digests.json"
MEGABYTES = 40
EFFORT = 20  # of WebP, 0 to 100: on CamVid 100 gives files 1 % smaller in three times the time


def digest(pixels):
    """Return the SHA-256 of a uint8 picture's size and pixels."""
    return hashlib.sha256(f"{pixels.shape}".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()


def encode(path):
    """Return the WebP bytes of a PNG file and the facts that `decode` needs."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint8 or pixels.shape[2:] not in ((), (3,)):
        raise MscsError(f"{path}: expected a PNG of 8 bits with one or three channels")
    shown = cv2.cvtColor(pixels, cv2.COLOR_GRAY2RGB if pixels.ndim == 2 else cv2.COLOR_BGR2RGB)
    stream = io.BytesIO()
    Image.fromarray(shown).save(stream, "webp", lossless=True, quality=EFFORT, method=4)
    return stream.getvalue(), {"sha256": digest(pixels), "channels": 1 if pixels.ndim == 2 else 3}


def decode(data, name, facts):
    """Return the pixels of a packed picture as OpenCV orders them; MscsError if they are not those packed."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if pixels is not None and facts["channels"] == 1:
        pixels = np.ascontiguousarray(pixels[..., 0])
    if pixels is None or digest(pixels) != facts["sha256"]:
        raise MscsError(f"{name}: not the pixels that were packed; pack and copy the parts again")
    return pixels


def pack(root, folder, part_bytes=MEGABYTES << 20):
    """Pack the PNG files below `root` into `folder`/part-1.zip, ...; return how many parts and bytes."""
    files = sorted(root.rglob("*.png"))
    if not files:
        raise UsageError(f"{root}: no PNG files; name the folder of a dataset")
    names = [path.relative_to(root).as_posix() for path in files]
    with ThreadPoolExecutor() as threads:
        packed = list(threads.map(encode, files))
    digests = json.dumps({name: facts for name, (_, facts) in zip(names, packed, strict=True)})
    total, room = sum(len(data) for data, _ in packed), part_bytes - 2 * len(digests)
    count = -(-total // int(0.99 * room))
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("part-*.zip"):
        old.unlink()
    done, sizes = 0, []
    for part in range(1, count + 1):
        path = folder / f"part-{part}.zip"
        with atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(DIGESTS, digests, zipfile.ZIP_DEFLATED)
            written = 0
            while done < len(names) and (part == count or written < total / count):
                archive.writestr(f"{names[done]}.webp", packed[done][0])
                written, done = written + len(packed[done][0]), done + 1
        sizes.append(path.stat().st_size)
    if max(sizes) > part_bytes:
        raise MscsError(f"a part has {max(sizes)} bytes, more than {part_bytes}; allow larger ones")
    return {"parts": count, "bytes": sum(sizes), "files": len(names)}


def unpack(folder, root):
    """Write the PNG files of all parts in `folder` below `root`, which appears whole or not at all."""
    if root.exists():
        raise UsageError(f"{root} is there already; remove it to unpack again")
    parts = sorted(folder.glob("part-*.zip"))
    if not parts:
        raise UsageError(f"{folder}: no part-*.zip; copy the parts that `pack` wrote")
    root.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        digests, found = {}, set()
        for part in parts:
            with zipfile.ZipFile(part) as archive:
                digests = json.loads(archive.read(DIGESTS))
                names = [name.removesuffix(".webp") for name in archive.namelist() if name != DIGESTS]
                data = [archive.read(f"{name}.webp") for name in names]
            with ThreadPoolExecutor() as threads:
                paths, facts = [inside(work, name) for name in names], [digests[name] for name in names]
                list(threads.map(_write, paths, threads.map(decode, data, names, facts)))
            found.update(names)
        missing = sorted(digests.keys() - found)
        if missing:
            raise MscsError(
                f"{folder}: {len(missing)} files are missing, such as {missing[0]}; copy all parts"
            )
        work.chmod(0o755)
        work.rename(root)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return {"files": len(found), "digest": hashlib.sha256(json.dumps(digests).encode()).hexdigest()}


def _write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1]):
        raise MscsError(f"{path}: cannot be written; check free space and rights")


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("verb", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path, help="what to pack or unpack")
    parser.add_argument("target", type=Path, help="folder to write")
    parser.add_argument("--megabytes", type=int, default=MEGABYTES, help="of a part (default: %(default)s)")
    return parser.parse_args()


def main():
    args = parse()
    try:
        if args.verb == "pack":
            changed = dataset_spec("camvid").changed_files(args.source)
            if changed:
                raise MscsError(f"{args.source}: {changed[0]} is not the official file; fetch CamVid again")
            print(pack(args.source, args.target, args.megabytes << 20))
        else:
            print(unpack(args.source, args.target))
    except MscsError as error:
        sys.exit(f"camvid.py: error: {error}")


if __name__ == "__main__":
    main()
