"""Loss curves of a pair of runs, as an SVG picture for the report."""

import csv
import io
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from reproduce.style import paper_style

CURVES = (("ce", "CE, trained with CE", "#0072b2", "-"), ("ce", "CE, trained with ours", "#d55e00", "-"))
LOSSES = "seed-*/losses.csv"
TOTAL = ("loss", "total loss of ours", "#d55e00", ":")


def draw_losses(baseline: Path, ours: Path) -> tuple[bytes, str] | None:
    """Return cross-entropy of both runs and the total of ours as SVG, and their last values in words.

    baseline, ours: folders of two runs; their seeds are averaged. None before both have losses.csv. The same
    files give the same bytes.
    """
    if not all(any(run.glob(LOSSES)) for run in (baseline, ours)):
        return None
    figure = Figure(figsize=(3.4, 1.9), layout="constrained")
    last = []
    with paper_style(), mpl.rc_context({"svg.hashsalt": "mscs", "svg.fonttype": "none"}):
        axis = figure.add_subplot(xlabel="training step", ylabel="loss")
        for path, (column, label, color, line) in zip((baseline, ours, ours), (*CURVES, TOTAL), strict=True):
            steps, values = mean_curve(path, column)
            axis.plot(steps, values, line, color=color, label=label, linewidth=1)
            last.append(f"{label} {values[-1]:.3f}")
        axis.set(xlim=(0, None), ylim=(0, None))
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend()
        picture = io.BytesIO()
        figure.savefig(picture, format="svg", metadata={"Date": None})
    return picture.getvalue(), ", ".join(last)


def mean_curve(run: Path, column: str) -> tuple[list[float], list[float]]:
    """Return the logged steps of a run and the mean over its seeds of one column at each."""
    found: dict[float, list[float]] = {}
    for path in sorted(run.glob(LOSSES)):
        for row in csv.DictReader(io.StringIO(path.read_text())):
            found.setdefault(float(row["step"]), []).append(float(row[column]))
    steps = sorted(found)
    return steps, [sum(found[step]) / len(found[step]) for step in steps]
