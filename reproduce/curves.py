"""Loss curves of a pair of runs, as an SVG picture for the report."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from reproduce.style import STYLE

CURVES = (("ce", "CE, trained with CE", "#0072b2", "-"), ("ce", "CE, trained with ours", "#d55e00", "-"))
TOTAL = ("loss", "total loss of ours", "#d55e00", ":")


def draw_losses(baseline: Sequence[Path], ours: Sequence[Path]) -> tuple[bytes, str] | None:
    """Return cross-entropy of both runs and the total of ours as SVG, and their last values in words.

    baseline, ours: losses.csv of each seed of two runs, which are averaged. None before both have one. The
    same files give the same bytes.
    """
    if not (baseline and ours):
        return None
    figure = Figure(figsize=(3.4, 1.9), layout="constrained")
    last = []
    with mpl.rc_context({**STYLE, "svg.hashsalt": "mscs", "svg.fonttype": "none"}):
        axis = figure.add_subplot(xlabel="training step", ylabel="loss")
        for files, (column, label, color, line) in zip((baseline, ours, ours), (*CURVES, TOTAL), strict=True):
            steps, values = mean_curve(files, column)
            axis.plot(steps, values, line, color=color, label=label, linewidth=1)
            last.append(f"{label} {values[-1]:.3f}")
        axis.set(xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend()
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue(), ", ".join(last)


def mean_curve(files: Sequence[Path], column: str) -> tuple[list[float], list[float]]:
    """Return the logged steps of a run and the mean over its seeds' files of one column at each."""
    found: dict[float, list[float]] = {}
    for path in files:
        for row in csv.DictReader(io.StringIO(path.read_text())):
            found.setdefault(float(row["step"]), []).append(float(row[column]))
    steps = sorted(found)
    return steps, [sum(found[step]) / len(found[step]) for step in steps]
