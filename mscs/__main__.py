"""The `mscs` command, also `python -m mscs`."""

import sys


def main() -> int:
    """Run the command line; without its packages, which a bare install leaves out, name the extra."""
    try:
        from mscs import cli

        return cli.main()
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name in ("", "mscs"):
            raise
        print(
            f"mscs: error: this command needs {name}, which is not installed: pip install 'mscs[train]' "
            "(the losses, mscs.losses, need PyTorch alone)",
            file=sys.stderr,
        )
        return 2


if __name__ == "__main__":
    sys.exit(main())
