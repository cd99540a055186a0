"""The two ways in which a command can fail, and the exit codes they carry."""

import difflib
from collections.abc import Iterable

MANY, SHOWN = 30, 5
"""Of more names than these, a message shows so few."""


class MscsError(Exception):
    """Something went wrong at run time (broken file, full disk, lost worker). Exit code 1.

    Messages quote names and answers from outside: control characters in them never reach a terminal.
    """

    exit_code = 1

    def __init__(self, message: object = "") -> None:
        text = str(message)
        super().__init__("".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text))


class UsageError(MscsError, ValueError):
    """The request itself is wrong (unknown name, impossible value, missing folder). Exit code 2."""

    exit_code = 2


def unknown_name(kind: str, found: object, accepted: Iterable[str]) -> str:
    """Return one message for an unknown name: what was found, the nearest valid name, all valid names."""
    names = sorted(accepted)
    near = difflib.get_close_matches(str(found), names, n=SHOWN, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else "."
    if len(names) > MANY:
        shown = ", ".join(near or names[:SHOWN])
        return f"unknown {kind} {found!r}{hint} Accepted are {len(names)} names, such as {shown}"
    return f"unknown {kind} {found!r}{hint} Accepted: {', '.join(names)}"
