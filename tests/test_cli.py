"""What a user's mistakes look like: one clear line, the right exit code, nothing lost."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from mscs import provenance
from mscs.checkpoint import save_weights
from mscs.cli import main

RUN = "cityscapes-hrnet-hr48-ce-b8-40k"
DATA = ["--set=train_images=8", "--set=val_images=3", "--set=image_size=[64, 96]"]
SMALL = [*DATA, "--set=steps=1", "--set=crop_size=[64, 96]", "--set=threads=1", "--set=log_every=1"]


def test_runs_and_show_print_json(project, capsys):
    assert main(["runs", "--json"]) == 0
    runs = json.loads(capsys.readouterr().out)
    assert {"run", "dataset", "model", "backbone", "variant"} == set(runs[0])
    assert main(["show", "cadis-ocrnet-r50-ours", "--profile", "paper", "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["crop_size"], shown["weight_decay"], shown["optimizer"]) == ([540, 960], 0.0, "adam")
    needed = "run profile dataset model backbone pretrained crop_size optimizer lr lr_schedule weight_decay"
    for key in f"{needed} batch_size steps loss projector evaluation".split():
        assert key in shown
        assert key in shown["sources"]


def test_show_tells_what_a_run_does_not_use(project, capsys):
    assert main(["show", "cityscapes-hrnet-hr48-ce"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    unused = {key for key, line in lines.items() if line.endswith("not used by this run")}
    assert {"temperature", "exp_decay"} <= unused
    assert not {"validate_every", "initial_weights", "lr"} & unused, "a key with its default is in use"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "cityscapes-hrnet-hr48-our"], ["did you mean 'cityscapes-hrnet-hr48-ours'", "mscs runs"]),
        (["show", RUN, "--profile", "minni"], ["'minni'", "did you mean 'mini'"]),
        (["show", RUN, "--set", "lr"], ["key=value"]),
        (["show", RUN, "--params", "nowhere.yaml"], ["nowhere.yaml", "not found"]),
        (["train", RUN, "--data-root", "nowhere"], ["nowhere", "mscs data"]),
        (["evaluate", RUN, "--data-root", "nowhere"], ["nowhere"]),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(project, capsys, arguments, words):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("mscs: error: ")
    for word in words:
        assert word in error
    assert "Traceback" not in error


def test_a_typo_in_params_names_file_section_and_key(project, capsys):
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("optimizer: sgd", "optimiser: sgd", 1))
    assert main(["runs"]) == 2
    error = capsys.readouterr().err
    assert "params.yaml: schedules.cityscapes-hrnet-hr48: unknown key 'optimiser'" in error
    assert "did you mean 'optimizer'" in error


def test_train_then_evaluate_then_score_again(project, generated, capsys):
    root = str(generated("cityscapes"))
    assert main(["train", RUN, "--data-root", root, *SMALL]) == 0
    assert main(["evaluate", RUN, "--data-root", root, *SMALL]) == 0
    (folder,) = (project / "results/mini/runs").iterdir()
    assert folder.name.startswith(f"{RUN}+"), "changed settings get a folder of their own"
    folder /= "seed-0"
    record = json.loads((folder / "evaluation.json").read_text())
    assert record["ss"]["n"] == 1
    assert 0 <= record["ss"]["miou"] <= 100
    assert len(record["ss"]["seeds"]["0"]["class_iou"]) == 19
    provenance = json.loads((folder / "run.json").read_text())
    assert provenance["settings"]["run"] == RUN
    assert "torch" in provenance["packages"]


def test_a_variant_has_a_name_that_stands_for_its_settings(project, generated, capsys):
    root = ["--data-root", str(generated("cityscapes"))]
    assert main(["runs", "--trained"]) == 0
    assert "nothing is trained" in capsys.readouterr().out
    assert main(["train", RUN, *root, *SMALL, "--set=lr=0.02", "--name=slow"]) == 0
    assert main(["train", RUN, *root, *SMALL]) == 0
    assert main(["evaluate", RUN, *root, "--name=slow"]) == 0
    capsys.readouterr()
    assert main(["runs", "--trained", "--json"]) == 0
    digest, slow = json.loads(capsys.readouterr().out)
    assert (slow["profile"], slow["run"], slow["seed"]) == ("mini", f"{RUN}+slow", "0")
    assert "lr=0.02" in slow["changed"]
    record = json.loads((project / f"results/mini/runs/{RUN}+slow/seed-0/evaluation.json").read_text())
    assert slow["ss"] == f"{record['ss']['miou']:.2f}"
    assert digest["ss"] == ""
    assert main(["train", RUN, *root, "--name=slow"]) == 0
    assert "is trained under these settings" in capsys.readouterr().out
    assert main(["train", RUN, *root, *SMALL, "--set=lr=0.03", "--name=slow"]) == 2
    assert "choose another name" in capsys.readouterr().err
    for name, words in (("slov", "did you mean 'slow'"), ("../x", "accepted are letters")):
        assert main(["evaluate", RUN, *root, "--name", name]) == 2
        assert words in capsys.readouterr().err


def test_a_broken_image_is_named_and_ends_with_1(project, generated, capsys):
    root = project / "broken"
    shutil.copytree(generated("cityscapes"), root)
    for image in root.glob("leftImg8bit/train/*/*.png"):
        image.write_bytes(image.read_bytes()[:200])
    assert main(["train", RUN, "--data-root", str(root), *SMALL]) == 1
    assert "_leftImg8bit.png" in capsys.readouterr().err


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_results_folder_is_a_clear_error(project, generated, capsys):
    (project / "results").mkdir()
    (project / "results").chmod(0o500)
    assert main(["train", RUN, "--data-root", str(generated("cityscapes")), *SMALL]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_results_file_in_the_way_is_a_clear_error(project, generated, capsys):
    (project / "results").write_text("in the way")
    assert main(["train", RUN, "--data-root", str(generated("cityscapes")), *SMALL]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_evaluating_an_untrained_run_says_so(project, generated, capsys):
    assert main(["evaluate", RUN, "--data-root", str(generated("cityscapes")), *DATA]) == 2
    assert "train the run first" in capsys.readouterr().err


def test_the_installed_command_answers(project):
    done = subprocess.run(
        [sys.executable, "-m", "mscs", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("mscs 0.")


def test_weights_of_another_network_are_refused_in_few_words(project, generated, capsys):
    save_weights(project / "w.safetensors", {"a": torch.ones(1)}, {})
    root = str(generated("cityscapes"))
    assert main(["evaluate", RUN, "--data-root", root, *DATA, "--checkpoint", "w.safetensors"]) == 2
    assert "does not fit HRNet" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text",
    ["3", "{", "{}", '{"runs": 3}', f'{{"runs": {{"{RUN}": 3}}}}', f'{{"runs": {{"{RUN}": {{"a": 3}}}}}}'],
)
def test_a_file_without_resolved_settings_is_named(project, capsys, text):
    (project / "resolved.json").write_text(text)
    assert main(["train", RUN, "--settings", "resolved.json"]) == 2
    assert "python -m reproduce resolve" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--processes", "3"], ["--processes", "0"], ["--restarts", "-1"]])
def test_impossible_numbers_of_processes_are_refused_at_once(project, capsys, arguments):
    assert main(["train", RUN, *arguments]) == 2
    assert "accepted are" in capsys.readouterr().err


def test_a_seed_that_the_run_does_not_have_is_refused(project, capsys):
    assert main(["train", RUN, "--seed", "7"]) == 2
    assert "the seeds of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ("image_size=[64, 64]", "was generated with image_size [64, 96], the settings"),
        ("train_images=9", "was generated with train 8, the settings"),
        ("val_images=9", "was generated with val 3, the settings"),
        ("data_source=real", "holds generated scenes, the settings"),
    ],
)
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_generated_data_that_is_not_what_the_settings_say_is_refused(
    project, generated, capsys, command, changed, words
):
    root = str(generated("cityscapes"))
    assert main([command, RUN, "--data-root", root, *SMALL, "--set", changed]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (project / "results").exists()


@pytest.mark.parametrize("marker", ["[]", "{", "{}"])
def test_a_broken_marker_of_generated_data_is_one_line(project, capsys, marker):
    (project / "data").mkdir()
    (project / "data" / "generated.json").write_text(marker)
    assert main(["train", RUN, "--data-root", "data", *SMALL]) in (1, 2)
    assert capsys.readouterr().err.count("\n") == 1


def test_real_data_is_refused_where_the_settings_say_generated(project, capsys):
    (project / "data").mkdir()
    assert main(["train", RUN, "--data-root", "data", *SMALL]) == 2
    assert "holds a real dataset, the settings" in capsys.readouterr().err


def test_random_weights_in_profile_paper_must_be_asked_for_by_name(project, capsys):
    path = project / "params.yaml"
    path.write_text(path.read_text().replace("pretrained: true", "pretrained: false"))
    assert main(["train", RUN, "--profile", "paper"]) == 2
    assert "--set pretrained=false" in capsys.readouterr().err
    for asked in ("pretrained=false", "initial_weights=w.pth"):
        assert main(["train", RUN, "--profile", "paper", "--set", asked]) == 2
        assert "no dataset" in capsys.readouterr().err


def test_a_restarted_process_does_not_start_afresh_again(project, generated, capsys, monkeypatch):
    command = ["train", RUN, "--data-root", str(generated("cityscapes")), *SMALL]
    assert main(command) == 0
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main([*command, "--fresh"]) == 0
    assert "is trained under these settings" in capsys.readouterr().out


def test_the_recorded_commit_is_that_of_the_code(tmp_path, monkeypatch):
    monkeypatch.delenv("MSCS_GIT_COMMIT", raising=False)
    code = tmp_path / "mscs" / "provenance.py"
    code.parent.mkdir()
    code.write_text("x")
    monkeypatch.setattr(provenance, "__file__", str(code))
    assert provenance.git_state() == {"commit": None, "dirty": None}
    git = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *words], check=True)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "x").write_text("not code")
    assert provenance.git_state()["dirty"] is False
    (tmp_path / "mscs" / "new.py").write_text("x")
    assert provenance.git_state()["dirty"] is True
