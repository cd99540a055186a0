"""Code named in settings: a digest of syntax trees, and modules of the user's own by import path.

An import path is `package.module:name`, importable from the environment or from the current folder, where
params.yaml lies. A run that uses one depends on a digest of the module and of what that imports, directly or
not, from its own package or, if it lies in the current folder, from there.

In a digest, comments, docstrings and texts for people (the arguments of `raise`, `warnings.warn`, `print` and
logging) do not count; all other strings, constants and annotations do. Python 3.11 to 3.14 give the same one.
"""

import ast
import hashlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mscs.errors import UsageError, unknown_name

IMPORT_PATH = r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*"
MESSAGES = re.compile(r"print|warnings\.warn|logg(er|ing)\.(debug|info|warning|error|exception|critical)")
OURS = ("mscs", "reproduce")
"""Packages whose code numerics.yaml covers."""


def load(path: str) -> Any:
    """Return what an import path names; UsageError where it cannot be imported."""
    module, _, name = path.partition(":")
    _require(path)
    try:
        found = vars(importlib.import_module(module))
    except Exception as error:  # whatever a module of the user's raises
        raise UsageError(
            f"{path}: importing {module} fails with {type(error).__name__}: {error} "
            f'(`python -c "import {module}"` shows where)'
        ) from error
    if name not in found:
        public = [known for known in found if not known.startswith("_")]
        raise UsageError(f"{path}: {unknown_name(f'name of module {module}', name, public)}")
    return found[name]


def _require(path: str) -> tuple[Path, list[Path]]:
    """Return the folder from which a module is imported, and its files; UsageError where there is none."""
    module, here = path.partition(":")[0], Path.cwd()
    if not {"", str(here)} & set(sys.path):
        sys.path.append(str(here))
    importlib.invalidate_caches()
    found = importlib.util.find_spec(module.partition(".")[0])
    for place in (*(found.submodule_search_locations or ()), found.origin) if found else ():
        base = Path(place or "").parent.resolve()  # of the folder: a file may be a link to another place
        files = list(_files_of(module, base))
        if files and module.rpartition(".")[2] in (files[-1].stem, files[-1].parent.name):
            return base, files
    raise UsageError(f"{path}: there is no module {module}, neither in {here} nor in the environment")


def own_files(path: str) -> list[Path]:
    """Return the files that the digest of an import path covers; nothing is imported.

    Raises UsageError where there is no such module, or where a file is no Python.
    """
    top = re.split("[.:]", path)[0]
    base, files = _require(path)
    seen: dict[Path, None] = {}
    while files:
        file = files.pop()
        if file in seen:
            continue
        seen[file] = None
        for name in _imported(file, base):
            first = name.partition(".")[0]
            if first == top or (base == Path.cwd().resolve() and first not in OURS):
                files += _files_of(name, base)
    return sorted(seen)


def _files_of(module: str, base: Path) -> Iterator[Path]:
    """Yield the file of a module below `base` and those of the packages that it lies in, where they are."""
    parts = module.split(".")
    for count in range(1, len(parts) + 1):
        place = base.joinpath(*parts[:count])
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                yield file


def _imported(file: Path, base: Path) -> Iterator[str]:
    """Yield the full names of what a file imports, wherever in it the import stands."""
    try:
        tree = ast.parse(file.read_text())
    except SyntaxError as error:
        raise UsageError(f"{file}, line {error.lineno}: {error.msg}") from None
    package = file.relative_to(base).parts[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def own_digest(path: str) -> str:
    """Return the digest of the code that an import path stands for."""
    return digest(map(str, own_files(path)))


def digest(files: Iterable[str], read: Callable[[str], str] = lambda path: Path(path).read_text()) -> str:
    """Return a unit's digest, 16 hex digits; names and order of its files do not count.

    Python files count by syntax tree, JSON files by content. `read` gives a file's text.
    """
    texts = {path: read(path) for path in files}
    contents = [json.loads(x) if p.endswith(".json") else canonical(ast.parse(x)) for p, x in texts.items()]
    return _hash(sorted(map(_hash, contents)))[:16]


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def canonical(node: Any) -> Any:
    """Return a syntax tree as nested lists that are the same on every supported Python.

    Empty fields are left out: newer versions have more of them (`type_params` since 3.12).
    """
    if isinstance(node, list):
        return [canonical(item) for item in node if not _is_docstring(item)]
    if isinstance(node, ast.Constant):  # its field `kind` (u"...") says nothing; ascii() never changes
        return ["Constant", type(node.value).__name__, ascii(node.value)]
    if not isinstance(node, ast.AST):
        return node
    if isinstance(node, ast.JoinedStr):
        return ["JoinedStr", _pieces(node.values)]
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
        fields["exc"] = node.exc.func
    elif isinstance(node, ast.Call) and MESSAGES.fullmatch(ast.unparse(node.func)):
        fields = {"func": node.func}
    return [type(node).__name__, [[k, canonical(v)] for k, v in fields.items() if v is not None and v != []]]


def _is_docstring(node: Any) -> bool:
    """Return whether a statement is a bare string: a docstring of a module, class, function or field."""
    text = node.value if isinstance(node, ast.Expr) else None
    return isinstance(text, ast.Constant) and isinstance(text.value, str)


def _pieces(values: list[ast.expr]) -> list[Any]:
    """Return the parts of an f-string; literal neighbours, which Pythons split differently, are joined."""
    parts: list[Any] = []
    for value in values:
        text = value.value if isinstance(value, ast.Constant) else None
        if not isinstance(text, str):
            parts.append(canonical(value))
        elif parts and isinstance(parts[-1], str):
            parts[-1] += text
        elif text:
            parts.append(text)
    return parts
