"""Facts -> text: tables in Markdown, CSV and LaTeX, and the Jinja templates of this folder."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from mscs.results import write_text

LATEX = {"~": r"$\sim$", "±": r"$\pm$", "×": r"$\times$", "†": r"$^\dagger$"}
LATEX |= {character: f"\\{character}" for character in "%#_&"}
LATEX |= {digit: f"$^{power}$" for digit, power in zip("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789", strict=True)}
"""What has a meaning in LaTeX or is missing there, and how to write it."""


def markdown_table(header: Sequence[Any], rows: Sequence[Sequence[Any]], *, aligned: bool = False) -> str:
    """Return a table in Markdown; `aligned` pads its columns for a terminal. Without rows it is empty."""
    if not rows:
        return ""
    grid = [[str(text).replace("|", "\\|") for text in row] for row in (header, *rows)]
    widths = [max(map(len, column)) if aligned else 3 for column in zip(*grid, strict=True)]
    grid.insert(1, ["-" * width for width in widths])
    if aligned:
        grid = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in grid]
    return "\n".join(f"| {' | '.join(row)} |" for row in grid)


def markdown_list(heading: str, items: Sequence[str]) -> str:
    """Return a heading with a list below it; empty without items."""
    return "\n".join([f"{heading}\n", *(f"- {item}" for item in items)]) if items else ""


def markdown_page(*blocks: str) -> str:
    """Return a text of blocks, without those that are empty."""
    return "\n\n".join(block for block in blocks if block) + "\n"


def csv_table(header: Sequence[Any], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table as CSV."""
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    return stream.getvalue()


def latex_table(title: str, stamp: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a LaTeX table environment (package booktabs) with title and stamp as its caption."""
    escapes = str.maketrans(LATEX)
    head, *lines = (" & ".join(text.translate(escapes) for text in row) + r" \\" for row in (header, *rows))
    return "\n".join(
        [
            r"\begin{table}",
            rf"\caption{{{title.translate(escapes)} ({stamp.translate(escapes)})}}",
            rf"\begin{{tabular}}{{{'l' * len(header)}}}",
            *(r"\toprule", head, r"\midrule", *lines, r"\bottomrule"),
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def write_table_files(
    path: Path,
    title: str,
    stamp: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    *further: str,
    plain: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write a table as `path`.md, with `further` blocks below it, .csv, with the rows `plain`, and .tex."""
    page = markdown_page(f"### {title}", f"*{stamp}*", markdown_table(header, rows), *further)
    write_text(path.with_suffix(".md"), page)
    write_text(path.with_suffix(".csv"), csv_table(header, plain or rows))
    write_text(path.with_suffix(".tex"), latex_table(title, stamp, header, rows))


def render(template: str, facts: dict[str, Any]) -> str:
    """Return a template filled in. HTML is escaped; `table` is `markdown_table`; no fact may be missing."""
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=select_autoescape(["html.j2"]),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.globals["table"] = markdown_table
    return templates.get_template(template).render(facts)
