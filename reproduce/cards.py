"""Result files and params.yaml -> model and data cards: what each is, how it came about, what for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mscs.datasets import Spec
from mscs.datasets.registry import dataset_spec
from mscs.results import write_text
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


def write_cards(results: Results) -> list[Path]:
    """Write a card for every evaluated run and every checked dataset of a profile; return their paths."""
    texts = {
        f"model-{run}": model_card(run, results) for run in results.params.runs if results.evaluation(run)
    }
    manifests = {name: results.read(f"data/{name}.json") for name in results.params.datasets}
    texts |= {
        f"data-{name}": data_card(results.params.spec(name), found, results.stamp)
        for name, found in manifests.items()
        if found
    }
    paths = {results.root / "cards" / f"{name}.md": text for name, text in texts.items()}
    for path, text in paths.items():
        write_text(path, text)
    return list(paths)


def model_card(run: str, results: Results) -> str:
    """Return the card of one evaluated run."""
    evaluation, record = results.evaluation(run) or {}, results.record(run)
    resolved = results.params.resolve(run, results.profile)
    # what it was trained with, which may no longer be what params.yaml says
    settings = record.get("settings") or resolved.values
    scores = {mode: evaluation[mode] for mode in ("ss", "ms") if mode in evaluation}
    seed = next(iter(next(iter(scores.values()))["seeds"].values()))
    by_class = zip(seed["class_iou"], evaluation["classes"], strict=True)
    facts = {
        "run": run,
        "stamp": results.stamp,
        "majority": evaluation["majority_miou"],
        "scores": [[mode, _mean(found), found["n"]] for mode, found in scores.items()],
        "published": [
            [cell.table, cell.row, cell.column, *filled_texts(results.fill(cell))]
            for cell in cells()
            if cell.run == run
        ],
        "weakest": [
            [name, f"{iou:.1f}"] for iou, name in sorted(x for x in by_class if x[0] is not None)[:WORST]
        ],
        "settings": [
            [key, _text(settings[key]), resolved.sources.get(key, "")] for key in SHOWN if key in settings
        ],
        "entries": [[row["id"], row["taken"], row["why"]] for row in ledger.rows(run, settings["recipe"])],
        "record": record,
    }
    return render("model_card.md.j2", facts)


def data_card(dataset: str | Spec, manifest: Mapping[str, Any], stamp: str) -> str:
    """Return the card of one dataset from its manifest: splits, classes, terms."""
    spec = dataset_spec(dataset)
    name = spec.name
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


def _mean(record: Mapping[str, Any]) -> str:
    return f"{record['miou']:.2f}" + ("" if record["std"] is None else f" ± {record['std']:.2f}")


def _text(value: Any) -> str:
    return (
        ", ".join(map(str, value))
        if isinstance(value, list | tuple)
        else str("-" if value is None else value)
    )
