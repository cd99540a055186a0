"""params.yaml -> Tables 4 to 7, the training settings, in the supplement's rows and columns."""

from collections.abc import Callable, Sequence
from pathlib import Path

import yaml

from mscs.params import Params
from mscs.results import write_text
from mscs.settings import Settings
from reproduce.rendering import csv_table, latex_table, markdown_page, markdown_table
from reproduce.tables import Results

DATASETS = {
    "4": ("cityscapes", "Cityscapes"),
    "5": ("ade20k", "ADE20K"),
    "6": ("pascal_context", "Pascal-Context"),
    "7": ("cadis", "CaDIS"),
}
HEADER = ["Model", "Backbone", "crop", "lr", "decay", "w_d", "Batch/steps", "optim"]
MODELS = {"hrnet": "HRNet", "ocrnet": "OCRNet", "deeplabv3": "DeepLabv3", "upernet": "UPerNet"}
BACKBONES = {
    "hrnet_w48": "HR48v2",
    "resnet50": "R50",
    "resnet101": "R101",
    "swin_tiny": "Swin-T",
    "swin_small": "Swin-S",
    "swin_base": "Swin-B",
    "swin_large": "Swin-L",
}
SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")

Number = Callable[[float], str]


def settings_rows(table: str, params: Params) -> list[Settings]:
    """Return the settings behind each row of a table: of the first CE run of each schedule, in file order."""
    schedules = list(yaml.safe_load(Path("params.yaml").read_text())["schedules"])
    runs = [run for run in params.runs if params.run_info(run)["dataset"] == DATASETS[table][0]]
    rows: dict[str, Settings] = {}
    for settings in (params.resolve(run, "paper").settings for run in runs):
        if settings.loss.name == "ce":
            rows.setdefault(settings.schedule.name, settings)
    return [rows[name] for name in schedules if name in rows]


def title(table: str) -> str:
    """Return a table's heading."""
    return f"Table {table}. Training settings on {DATASETS[table][1]}"


def stamp(params: Params) -> str:
    """Return what every table of settings says of itself."""
    return f"settings of profile paper, recipe {params.recipe}"


def plain(value: float) -> str:
    """Return 6e-5 for 0.00006 and - for 0."""
    digits, _, exponent = f"{value:e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}" if value else "-"


def unicode_power(value: float) -> str:
    """Return 6×10⁻⁵ for 0.00006."""
    digits, _, exponent = plain(value).partition("e")
    power = f"10{exponent.translate(SUPERSCRIPTS)}" if exponent else ""
    return power if digits == "1" else f"{digits}×{power}" if power else digits


def latex_power(value: float) -> str:
    r"""Return $6\times10^{-5}$ for 0.00006."""
    digits, _, exponent = plain(value).partition("e")
    if not exponent:
        return digits
    return f"$10^{{{exponent}}}$" if digits == "1" else rf"${digits}\times10^{{{exponent}}}$"


def grid(rows: Sequence[Settings], number: Number = plain, times: str = "x") -> list[list[str]]:
    """Return the rows of a table as text: one per network, in the columns of `HEADER`."""
    return [
        [
            MODELS[row.model.name],
            BACKBONES[row.model.backbone.partition(".")[0].partition("_patch")[0]],
            times.join(map(str, row.schedule.crop_size)),
            number(row.schedule.lr),
            row.schedule.lr_schedule.name,
            number(row.schedule.weight_decay),
            f"{row.schedule.batch_size}/{row.schedule.steps / 1000:g}K",
            row.schedule.optimizer.name.upper(),
        ]
        for row in rows
    ]


def write_settings_table(table: str, params: Params, results: Results) -> None:
    """Write one of Tables 4 to 7 as Markdown, CSV and LaTeX into results/<profile>/tables."""
    rows = settings_rows(table, params)
    path = results.root / "tables" / f"{table}.md"
    heading, origin = title(table), stamp(params)
    shown = markdown_table(HEADER, grid(rows, unicode_power, "×"))
    write_text(path, markdown_page(f"### {heading}", f"*{origin}*", shown))
    write_text(path.with_suffix(".csv"), csv_table(HEADER, grid(rows)))
    latex = grid(rows, latex_power, r"$\times$")
    write_text(path.with_suffix(".tex"), latex_table(heading, origin, HEADER, latex))
