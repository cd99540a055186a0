import shutil
from pathlib import Path

import pytest

from reproduce.cli import main
from reproduce.settings_tables import grid, power, settings_rows, typeset

ROOT = Path(__file__).parents[2]
# the supplement's rows, typed from it: model, backbone, crop, lr, decay, weight decay, batch/steps, optimiser
SUPPLEMENT = {
    "4": """
HRNet HR48v2 512x1024 1e-2 poly 5e-5 12/120K SGD
OCRNet HR48v2 512x1024 1e-2 poly 5e-5 12/120K SGD
DeepLabv3 R101 512x1024 1e-2 poly 5e-5 12/120K SGD
UPerNet R101 512x1024 1e-2 poly 5e-5 12/120K SGD
UPerNet Swin-T 512x1024 6e-5 linear 1e-2 8/120K ADAMW
UPerNet Swin-S 512x1024 6e-5 linear 1e-2 8/120K ADAMW
UPerNet Swin-B 512x1024 6e-5 linear 1e-2 8/120K ADAMW""",
    "5": """
OCRNet HR48v2 512x512 1e-2 poly 1e-4 16/160K SGD
DeepLabv3 R101 512x512 1e-2 poly 1e-4 16/160K SGD
UPerNet R101 512x512 1e-2 poly 1e-4 16/160K SGD
UPerNet Swin-T 512x512 6e-5 linear 1e-2 16/160K ADAMW
UPerNet Swin-S 512x512 6e-5 linear 1e-2 16/160K ADAMW
UPerNet Swin-B 512x512 6e-5 linear 1e-2 16/160K ADAMW
UPerNet Swin-L 640x640 6e-5 linear 1e-2 16/160K ADAMW""",
    "6": """
OCRNet HR48v2 512x512 1e-3 poly 1e-4 16/160K SGD
HRNet HR48v2 512x512 1e-3 poly 1e-4 16/160K SGD""",
    "7": """
OCRNet R50 540x960 1e-4 exp - 8/20K ADAM""",
}


@pytest.mark.parametrize("table", SUPPLEMENT)
def test_the_generated_rows_are_the_supplements(table, params):
    expected = [line.split() for line in SUPPLEMENT[table].split("\n") if line]
    assert grid(settings_rows(table, params)) == expected


def test_both_losses_of_a_row_train_alike(params):
    for table in SUPPLEMENT:
        for row in settings_rows(table, params):
            ours = params.resolve(row.run.removesuffix("ce") + "ours", "paper").settings
            assert grid([ours]) == grid([row])


def test_powers_of_ten():
    assert [power(x) for x in (6e-5, 1e-2, 0.0)] == ["6e-5", "1e-2", "-"]
    shown = [typeset(text) for text in ("6e-5", "1e-2", "-", "512x1024", "HR48v2", "exp")]
    assert shown == ["6×10⁻⁵", "10⁻²", "-", "512×1024", "HR48v2", "exp"]


def test_the_command_writes_all_formats(tmp_path, monkeypatch, capsys):
    for name in ("params.yaml", "numerics.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["tables", "5"]) == 0
    folder = tmp_path / "results/mini/tables"
    assert sorted(path.name for path in folder.iterdir()) == ["5.csv", "5.md", "5.tex"]
    assert "| UPerNet | Swin-L | 640×640 | 6×10⁻⁵ | linear |" in (folder / "5.md").read_text()
    assert r"640$\times$640 & 6$\times$10$^-$$^5$" in (folder / "5.tex").read_text()
    assert main(["tables", "8"]) == 2
    assert "unknown table '8'" in capsys.readouterr().err
