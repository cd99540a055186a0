"""Result files and params.yaml -> model and data cards: what each is, how it came about, what for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mscs.datasets import DATASETS
from mscs.params import Params
from mscs.results import read_json, write_text
from reproduce import ledger
from reproduce.cells import cells
from reproduce.rendering import render
from reproduce.tables import Results, filled_texts

SHOWN = (
    *("dataset", "task", "data_source", "model", "backbone", "pretrained", "projector", "loss", "crop_size"),
    *("optimizer", "lr", "lr_schedule", "weight_decay", "batch_size", "images_per_group", "steps"),
    *("precision", "evaluation", "seeds", "recipe"),
)
WORST = 5


def write_cards(params: Params, results: Results) -> list[Path]:
    """Write a card for every evaluated run and every checked dataset of a profile; return their paths."""
    texts = {
        f"model-{run}": model_card(run, params, results) for run in params.runs if results.evaluation(run)
    }
    manifests = {name: results.root / "data" / f"{name}.json" for name in DATASETS}
    texts |= {
        f"data-{name}": data_card(name, read_json(path), results.stamp)
        for name, path in manifests.items()
        if path.exists()
    }
    paths = [results.root / "cards" / f"{name}.md" for name in texts]
    for path, text in zip(paths, texts.values(), strict=True):
        write_text(path, text)
    return paths


def model_card(run: str, params: Params, results: Results) -> str:
    """Return the card of one evaluated run."""
    evaluation = results.evaluation(run) or {}
    record = results.record(run)
    resolved = params.resolve(run, results.profile)
    # what it was trained with, which may no longer be what params.yaml says
    settings = record.get("settings") or resolved.values
    facts = {
        "run": run,
        "stamp": results.stamp,
        "majority": evaluation["majority_miou"],
        "scores": [[mode, *_score(evaluation[mode])] for mode in ("ss", "ms") if mode in evaluation],
        "published": [
            [cell.table, cell.row, cell.column, *filled_texts(results.fill(cell))]
            for cell in cells()
            if cell.run == run
        ],
        "weakest": _weakest(evaluation),
        "settings": [
            [key, _text(settings[key]), resolved.sources.get(key, "")] for key in SHOWN if key in settings
        ],
        "entries": [[row["id"], row["taken"], row["why"]] for row in ledger.rows(run, settings["recipe"])],
        "record": record,
    }
    return render("model_card.md.j2", facts)


def data_card(name: str, manifest: Mapping[str, Any], stamp: str) -> str:
    """Return the card of one dataset from its manifest: splits, classes, terms."""
    spec = DATASETS[name]
    labels = {f"{name}, task {one.task}" if one.task else name: one for one in spec.label_sets}
    facts = {
        "name": name,
        "stamp": stamp,
        "manifest": manifest,
        "source": spec,
        "splits": [[split, count, spec.splits.get(split, "")] for split, count in manifest["splits"].items()],
        "labels": [[title, found.num_classes, ", ".join(found.classes)] for title, found in labels.items()],
    }
    return render("data_card.md.j2", facts)


def _score(record: Mapping[str, Any]) -> tuple[str, int]:
    spread = "" if record["std"] is None else f" ± {record['std']:.2f}"
    return f"{record['miou']:.2f}{spread}", record["n"]


def _weakest(evaluation: Mapping[str, Any]) -> list[list[str]]:
    mode = evaluation["ss"] if "ss" in evaluation else evaluation["ms"]
    scores = next(iter(mode["seeds"].values()))["class_iou"]
    named = [(iou, name) for iou, name in zip(scores, evaluation["classes"], strict=True) if iou is not None]
    return [[name, f"{iou:.1f}"] for iou, name in sorted(named)[:WORST]]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
