"""One look for all figures: sizes for one LNCS column, Type 42 fonts, the stamp, byte-stable files."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mscs.results import atomic_path

COLUMN = 4.8
"""Width of a text column of the paper (LNCS) in inches."""
MARKERS = "os^DvPX*"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": 6.5,
    "axes.titlesize": 7,
    "axes.linewidth": 0.5,
    "legend.fontsize": 6,
    "legend.frameon": False,
    "pdf.fonttype": 42,
    "savefig.dpi": 300,
}


@contextmanager
def paper_style() -> Iterator[None]:
    """Apply the shared style within a block."""
    with mpl.rc_context(STYLE):
        yield


def save(
    figure: Figure, folder: Path, name: str, stamp: str, *, formats: Sequence[str] = ("png", "pdf")
) -> None:
    """Write `name`.png and .pdf with the stamp at the foot; the same figure gives the same bytes."""
    figure.text(0.5, 0.004, stamp, ha="center", va="bottom", fontsize=5.5, color="#555555")
    for kind in formats:
        undated = {"CreationDate": None} if kind == "pdf" else None
        with atomic_path(folder / f"{name}.{kind}") as temporary:
            figure.savefig(temporary, format=kind, metadata=undated)


def class_marker(index: int) -> str:
    """Return the marker of a class: a second channel beside colour, as official palettes have near-twins."""
    return MARKERS[index % len(MARKERS)]


def point_legend(classes: Sequence[str], colors: np.ndarray, shown: Sequence[int]) -> list[Line2D]:
    """Return legend handles for the classes with ids `shown`; colors: uint8 (K, 3)."""
    return [
        Line2D(
            [],
            [],
            linestyle="",
            marker=class_marker(i),
            color=colors[i] / 255,
            markersize=3.5,
            label=classes[i],
        )
        for i in shown
    ]
