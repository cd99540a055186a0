"""What each pipeline stage does. Called by reproduce/stage as `VERB PROFILE [NAME]`; not meant for people.

A stage takes its settings from results/<profile>/resolved.json, the file its hash is made of, never from
params.yaml directly.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mscs.cli import RESULTS, WORK, data_root, main, read_resolved, require_data, resolve_all, run_command
from mscs.datasets.commands import default_root
from mscs.errors import MscsError
from mscs.params import load_params
from mscs.results import read_json, write_json
from reproduce.pipeline import FIGURE_RUNS, TSNE_RUNS
from reproduce.runtime import run_in_container, wants_container


def resolve(profile: str) -> None:
    """Write results/<profile>/resolved.json, which every other stage's hash is made of."""
    write_json(_resolved(profile), resolve_all(load_params(), profile))


def data(profile: str, dataset: str) -> None:
    """Make (mini) or check (paper) one dataset and write its manifest."""
    from mscs.datasets.toy import write_dataset
    from mscs.datasets.verify import manifest

    settings = read_json(_resolved(profile))[dataset]
    if settings["data_source"] == "generated":
        root = WORK / profile / "data" / dataset
        write_dataset(
            dataset,
            root,
            train=settings["train_images"],
            val=settings["val_images"],
            image_size=tuple(settings["image_size"]),
        )
    else:
        root = default_root(dataset)
    facts = manifest(dataset, root, settings["task"])
    del facts["files"]  # they stay in the dataset's own manifest.json; the digest stands for them
    if settings["data_source"] == "generated":
        facts["colour_miou"] = _colour_miou(dataset, root, settings["task"])
    write_json(RESULTS / profile / "data" / f"{dataset}.json", facts)


def train(profile: str, run: str) -> int:
    """Train one run, or go on with it."""
    return main(["train", run, "--settings", str(_resolved(profile)), *_fresh()])


def evaluate(profile: str, run: str) -> int:
    """Score one run."""
    return main(["evaluate", run, "--settings", str(_resolved(profile))])


def tables(profile: str, table: str) -> None:
    """Write one table."""
    from reproduce.tables import Results, write_table

    write_table(table, Results(profile))


def tsne(profile: str) -> None:
    """Draw Fig. 1."""
    from reproduce.tables import Results
    from reproduce.tsne import write_tsne

    baseline, ours = (_trained(profile, run) for run in TSNE_RUNS)
    write_tsne(baseline, ours, RESULTS / profile / "figures", Results(profile).stamp)


def qualitative(profile: str) -> None:
    """Draw Figs. 2 to 4."""
    from reproduce.qualitative import write_comparisons
    from reproduce.tables import Results

    folder = RESULTS / profile / "figures"
    facts = {}
    for figure, (baseline, ours) in FIGURE_RUNS.items():
        pair = _trained(profile, baseline), _trained(profile, ours)
        facts[figure] = write_comparisons(figure, *pair, folder, Results(profile).stamp)
    write_json(folder / "qualitative.json", facts)


def report(profile: str) -> None:
    """Write report.html and report.md."""
    from reproduce.report import write_report

    write_report(profile, RESULTS / profile)


VERBS: dict[str, Callable[..., int | None]] = {
    stage.__name__: stage for stage in (resolve, data, train, evaluate, tables, tsne, qualitative, report)
}


def _resolved(profile: str) -> Path:
    return RESULTS / profile / "resolved.json"


def _fresh() -> list[str]:
    return ["--fresh"] if os.environ.get("MSCS_FRESH") else []


def _colour_miou(dataset: str, root: Path, task: int | None) -> float:
    from mscs.datasets import build_dataset
    from reproduce.baselines import colour_miou

    return colour_miou(*(build_dataset(dataset, split, root, task) for split in ("train", "val")))


def _trained(profile: str, run: str) -> Any:
    from reproduce.trained import TrainedRun

    settings = read_resolved(_resolved(profile), run)
    root = data_root(settings)
    require_data(settings, root)
    weights = WORK / profile / "runs" / run / "weights" / f"seed-{settings.seeds[0]}.safetensors"
    return TrainedRun(settings, weights, root, run)


def parser() -> argparse.ArgumentParser:
    """Return the stage parser."""
    result = argparse.ArgumentParser(prog="reproduce/stage", description=__doc__)
    result.add_argument("verb", choices=sorted(VERBS))
    result.add_argument("profile")
    result.add_argument("name", nargs="?")
    result.set_defaults(handler=_handle)
    return result


def _handle(args: argparse.Namespace) -> int | None:
    if not _resolved(args.profile).exists() and args.verb != "resolve":
        raise MscsError(f"{_resolved(args.profile)} is missing; run `dvc repro resolve` first")
    if wants_container(args.profile):
        return run_in_container(args.verb, args.profile, args.name)
    return VERBS[args.verb](args.profile, *([args.name] if args.name else []))


def run(argv: Sequence[str] | None = None) -> int:
    """Run one stage."""
    return run_command(parser(), argv)


if __name__ == "__main__":
    sys.exit(run())
