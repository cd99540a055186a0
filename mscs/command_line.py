"""What the command lines of `mscs` and `python -m reproduce` share."""

import argparse
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from mscs.errors import MscsError

Handler = Callable[[argparse.Namespace], int | None]


def run_command(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> int:
    """Parse `argv`, call the chosen handler and turn errors into one line on stderr and an exit code.

    2 is misuse, 1 failure, 130 an interrupt.
    """
    args = parser.parse_args(argv)
    args.argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.handler(args) or 0)
    except MscsError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        said = f"{error.strerror}: {error.filename}" if error.strerror else error
        print(f"{parser.prog}: error: {said}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def loading() -> Iterator[None]:
    """Let Ctrl-C end the process at once while modules are loaded, which may swallow an exception."""
    if threading.current_thread() is not threading.main_thread():  # which alone may set handlers
        yield
        return
    before = signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def add_command(
    commands: Any,
    name: str,
    handler: Handler,
    text: str,
    *,
    params: bool = False,
    profile: bool = False,
    as_json: bool = False,
) -> argparse.ArgumentParser:
    """Add one subcommand, with the arguments that many have."""
    sub: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text[0].upper() + text[1:] + "."
    )
    sub.set_defaults(handler=handler)
    if params:
        sub.add_argument(
            "--params", type=Path, default=Path("params.yaml"), help="parameter file (default: %(default)s)"
        )
    if profile:
        sub.add_argument("--profile", help="mini, small or paper (default: the one in params.yaml)")
    if as_json:
        sub.add_argument("--json", action="store_true", help="print JSON")
    return sub
