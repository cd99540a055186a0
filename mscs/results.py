"""Files that cross from one stage to the next: written atomically, read back with clear errors."""

import csv
import hashlib
import json
import os
import statistics
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mscs.errors import MscsError, UsageError


def inside(folder: str | Path, name: str) -> Path:
    """Return `folder / name` for a name that came from outside; MscsError unless that lies in `folder`.

    Accepted are relative paths with "/" between printable names; "..", "\\" and ":" are refused.
    """
    parts = name.split("/")
    below = name[:1] != "/" and ".." not in parts and not {*parts} <= {"", "."}
    if not below or not name.isprintable() or "\\" in name or ":" in name:
        raise MscsError(f"{name!r} points outside of {folder} or is no plain file name; refused")
    return Path(folder, name)


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path` that takes its place when the block ends without error."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise MscsError(
            f"cannot write {path}: {error.strerror}; check the folder's rights and free space"
        ) from None
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    except OSError as error:
        raise MscsError(
            f"cannot write {path}: {error.strerror}; what was there before is untouched"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file atomically, keys (strings) in the order given, stable to the byte.

    A list of plain values stands on one line, so that a matrix takes a line per row; all else is indented.
    """
    write_text(path, _as_json(value, "\n") + "\n")


def _as_json(value: Any, line: str) -> str:
    """Return `value` as JSON; `line` is a line break with the indentation of what encloses it."""
    inner = f"{line} "
    if isinstance(value, Mapping) and value:
        items = (f"{json.dumps(key, ensure_ascii=False)}: {_as_json(x, inner)}" for key, x in value.items())
        return "{" + inner + f",{inner}".join(items) + line + "}"
    if isinstance(value, list | tuple) and any(isinstance(x, Mapping | list | tuple) for x in value):
        return "[" + inner + f",{inner}".join(_as_json(x, inner) for x in value) + line + "]"
    return json.dumps(value, ensure_ascii=False)


def file_sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: str | Path) -> Any:
    """Read a JSON file; a missing or broken one is an MscsError naming it."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise MscsError(f"{path} does not exist") from None
    except (ValueError, RecursionError) as error:
        raise MscsError(f"{path} is not valid JSON: {error}") from None


def read_mapping(path: str | Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; anything else is an MscsError naming it."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise MscsError(f"{path} holds no JSON object")
    return value


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """YAML without doubled keys, of which the last would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        double = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if double is not None:
            raise yaml.YAMLError(f"key {double!r} stands twice in one mapping{node.start_mark}")
        return super().construct_mapping(node, deep)


def read_yaml(path: str | Path, remedy: str) -> Any:
    """Read a YAML file that a person edits; a missing or broken one is a UsageError naming it."""
    path = Path(path)
    try:
        return yaml.load(path.read_text(), Loader=_Loader)
    except FileNotFoundError:
        place = f"{path} not found in {Path.cwd()}; run from the project's root folder"
        raise UsageError(f"{place} or {remedy}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV atomically; the columns are those of all rows, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def join_seeds(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return one evaluation record of several seeds, with mean and standard deviation of their mIoU."""
    joined = {key: value for record in records for key, value in record.items() if key not in ("ss", "ms")}
    for mode in ("ss", "ms"):
        seeds = {k: v for record in records if mode in record for k, v in record[mode]["seeds"].items()}
        if seeds:
            values = [entry["miou"] for entry in seeds.values()]
            std = statistics.stdev(values) if len(values) > 1 else None
            joined[mode] = {"miou": statistics.fmean(values), "std": std, "n": len(values), "seeds": seeds}
    return joined
