"""Result files and params.yaml -> model and data cards: what each is, how it came about, what for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mscs.datasets import DATASETS
from mscs.params import Params, to_plain
from mscs.results import read_json, write_text
from reproduce import ledger
from reproduce.cells import Cell, cells
from reproduce.tables import Results, filled_texts

SHOWN = (
    *("dataset", "task", "data_source", "model", "backbone", "pretrained", "projector", "loss", "crop_size"),
    *("optimizer", "lr", "lr_schedule", "weight_decay", "batch_size", "images_per_group", "steps"),
    *("precision", "evaluation", "seeds", "recipe"),
)
WORST = 5
USES = (
    "For research: repeating, checking and extending the paper. A score on one validation set says nothing "
    "about other cameras, places or hospitals; nothing here is fit for driving or for medical decisions."
)


def write_cards(params: Params, results: Results) -> list[Path]:
    """Write a card for every evaluated run and every checked dataset of a profile; return their paths."""
    folder = results.root / "cards"
    runs = [run for run in params.runs if results.evaluation(run)]
    texts = {f"model-{run}": model_card(run, params, results) for run in runs}
    manifests = {name: results.root / "data" / f"{name}.json" for name in DATASETS}
    texts |= {
        f"data-{name}": data_card(name, read_json(path), results.stamp)
        for name, path in manifests.items()
        if path.exists()
    }
    for name, text in texts.items():
        write_text(folder / f"{name}.md", text)
    return [folder / f"{name}.md" for name in texts]


def model_card(run: str, params: Params, results: Results) -> str:
    """Return the card of one evaluated run."""
    evaluation, record = results.evaluation(run) or {}, _record(run, results)
    resolved = params.resolve(run, results.profile)
    # what it was trained with, which may no longer be what params.yaml says
    settings = record.get("settings") or to_plain(resolved.settings)
    found = [[mode, *_score(evaluation[mode])] for mode in ("ss", "ms") if mode in evaluation]
    shown = [[key, _text(settings[key]), resolved.sources.get(key, "")] for key in SHOWN if key in settings]
    blocks = [
        f"# Model card: {run}",
        f"*{results.stamp}*",
        "## Results",
        f"On the validation split; answering the most frequent class everywhere gives "
        f"{evaluation['majority_miou']:.1f}.",
        *_table(["protocol", "mIoU (%)", "seeds"], found),
        *_published([cell for cell in cells() if cell.run == run], results),
        "## Weakest classes",
        *_table(["class", "IoU (%), first seed"], _weakest(evaluation)),
        "## Training",
        *_table(["setting", "value", "source"], shown),
        "## Where the sources disagree",
        *_table(["entry", "taken in profile paper", "why"], _entries(run, settings["recipe"])),
        "## Use",
        USES,
        "## Provenance",
        *_table(["what", "value"], _provenance(record, settings)),
    ]
    return "\n\n".join(blocks) + "\n"


def data_card(name: str, manifest: Mapping[str, Any], stamp: str) -> str:
    """Return the card of one dataset from its manifest: splits, classes, terms."""
    kind = "Generated scenes in the layout of" if manifest["generated"] else "The published"
    spec = DATASETS[name]
    splits = [[split, count, spec.splits.get(split, "")] for split, count in manifest["splits"].items()]
    classes = [
        [
            f"{name}, task {labels.task}" if labels.task else name,
            labels.num_classes,
            ", ".join(labels.classes),
        ]
        for labels in spec.label_sets
    ]
    facts = [["digest of all files", manifest["digest"]]]
    if "colour_miou" in manifest:
        facts.append(["mIoU (%) when only a pixel's colour is seen", f"{manifest['colour_miou']:.1f}"])
    blocks = [
        f"# Data card: {name}",
        f"*{stamp}*",
        f"{kind} {name}. Terms of the published dataset: {spec.licence}. Home: <{spec.home}>.",
        *_table(["split", "images here", "images published"], splits),
        *_table(["labels", "classes", "names"], classes),
        *_table(["fact", "value"], facts),
    ]
    return "\n\n".join(blocks) + "\n"


def _record(run: str, results: Results) -> dict[str, Any]:
    path = results.root / "runs" / run / "run.json"
    return read_json(path) if path.exists() else {}


def _score(record: Mapping[str, Any]) -> list[str]:
    spread = "" if record["std"] is None else f" ± {record['std']:.2f}"
    return [f"{record['miou']:.2f}{spread}", str(record["n"])]


def _published(found: Sequence[Cell], results: Results) -> list[str]:
    rows = [[cell.table, cell.row, cell.column, *filled_texts(results.fill(cell))] for cell in found]
    return _table(["table", "row", "column", "paper", "ours", "difference", "status"], rows)


def _weakest(evaluation: Mapping[str, Any]) -> list[list[str]]:
    mode = evaluation["ss"] if "ss" in evaluation else evaluation["ms"]
    scores = next(iter(mode["seeds"].values()))["class_iou"]
    named = [(iou, name) for iou, name in zip(scores, evaluation["classes"], strict=True) if iou is not None]
    return [[name, f"{iou:.1f}"] for iou, name in sorted(named)[:WORST]]


def _entries(run: str, recipe: str) -> list[list[str]]:
    return [[row["id"], row["taken"], row["why"]] for row in ledger.rows(run, recipe)]


def _provenance(record: Mapping[str, Any], settings: Mapping[str, Any]) -> list[list[str]]:
    if not record:
        return [["run.json", "not here: the run was restored from a cache or trained elsewhere"]]
    machine, git = record["machine"], record["git"]
    hardware = machine.get("gpus") or [machine["cpu"]]
    hours = record.get("gpu_hours")
    return [
        ["commit", f"{git['commit']}{' with changes' if git['dirty'] else ''}"],
        ["data digest", _text(record.get("data"))],
        ["packages", ", ".join(f"{name} {version}" for name, version in record["packages"].items())],
        ["image", _text(record["image"])],
        ["hardware", ", ".join(hardware)],
        ["processes", str(record["world_size"])],
        ["training time (s)", f"{record['seconds']:.0f} for {len(settings['seeds'])} seed(s)"],
        ["GPU-hours", "-" if hours is None else f"{hours:.1f}"],
        ["peak memory of a process (GiB)", f"{record['peak_bytes'] / 2**30:.1f}"],
        ["finished", record["finished"]],
    ]


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a Markdown table as a list of one block, or of none where there are no rows."""
    if not rows:
        return []
    lines = [header, ["---"] * len(header), *rows]
    return ["\n".join("| " + " | ".join(str(x).replace("|", "\\|") for x in line) + " |" for line in lines)]
