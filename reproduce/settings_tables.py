"""params.yaml -> Tables 4 to 7, the training settings, in the supplement's rows and columns."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from mscs.params import Params
from mscs.settings import Settings
from reproduce.rendering import write_table_files
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


def power(value: float) -> str:
    """Return 6e-5 for 0.00006 and - for 0."""
    digits, _, exponent = f"{value:e}".partition("e")
    return f"{float(digits):g}e{int(exponent)}" if value else "-"


def typeset(text: str) -> str:
    """Return 6×10⁻⁵ for 6e-5, 10⁻² for 1e-2 and 512×1024 for 512x1024."""
    if found := re.fullmatch(r"(.+)e(-?\d+)", text):
        power = f"10{found[2].translate(SUPERSCRIPTS)}"
        return power if found[1] == "1" else f"{found[1]}×{power}"
    return re.sub(r"(?<=\d)x(?=\d)", "×", text)


def grid(rows: Sequence[Settings]) -> list[list[str]]:
    """Return the rows of a table as text: one per network, in the columns of `HEADER`."""
    return [
        [
            MODELS[row.model.name],
            BACKBONES[row.model.backbone.partition(".")[0].partition("_patch")[0]],
            "x".join(map(str, row.schedule.crop_size)),
            power(row.schedule.lr),
            row.schedule.lr_schedule.name,
            power(row.schedule.weight_decay),
            f"{row.schedule.batch_size}/{row.schedule.steps / 1000:g}K",
            row.schedule.optimizer.name.upper(),
        ]
        for row in rows
    ]


def typeset_grid(table: str, params: Params) -> list[list[str]]:
    """Return the rows of one of Tables 4 to 7 for readers."""
    return [[typeset(text) for text in row] for row in grid(settings_rows(table, params))]


def write_settings_table(table: str, results: Results) -> None:
    """Write one of Tables 4 to 7 as Markdown, CSV and LaTeX into results/<profile>/tables."""
    path, params = results.root / "tables" / table, results.params
    rows, plain = typeset_grid(table, params), grid(settings_rows(table, params))
    write_table_files(path, title(table), stamp(params), HEADER, rows, plain=plain)
