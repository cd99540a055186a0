"""One look for all figures: sizes for one LNCS column, Type 42 fonts, the stamp, byte-stable files."""

from pathlib import Path

from matplotlib.figure import Figure

from mscs.results import atomic_path

COLUMN = 4.8
"""Width of a text column of the paper (LNCS) in inches."""
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
"""Applied by `matplotlib.rc_context`."""


def save(figure: Figure, folder: Path, name: str, stamp: str) -> None:
    """Write `name`.png and .pdf with the stamp at the foot; the same figure gives the same bytes."""
    figure.text(0.5, 0.004, stamp, ha="center", va="bottom", fontsize=5.5, color="#555555")
    for kind, undated in (("png", None), ("pdf", {"CreationDate": None})):
        with atomic_path(folder / f"{name}.{kind}") as temporary:
            figure.savefig(temporary, format=kind, metadata=undated)
