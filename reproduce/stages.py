"""What each pipeline stage does. Called by reproduce/stage as `VERB PROFILE [NAME [SEED]]`, not by people.

A stage takes its settings from results/<profile>/resolved.json, the file its hash is made of, never from
params.yaml directly.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from mscs import launch
from mscs.command_line import run_command
from mscs.errors import MscsError
from mscs.job import Job
from mscs.params import load_params
from mscs.paths import RESULTS, SeedFiles, data_root, dataset_root, read_resolved, resolve_all, resolved_path
from mscs.results import read_json, write_json
from reproduce.cells import TSNE_RUNS
from reproduce.pipeline import Pipeline
from reproduce.runtime import run_in_container, runtime_of
from reproduce.slurm import run_as_job
from reproduce.tables import Results

if TYPE_CHECKING:
    from reproduce.trained import TrainedRun


def resolve(profile: str, *, check: bool = True) -> None:
    """Write results/<profile>/resolved.json, which every other stage's hash is made of.

    check: whether the pipeline files must fit params.yaml.
    """
    params = load_params()
    if check:
        Pipeline(params, profile).check()
    write_json(resolved_path(profile), resolve_all(params, profile))


def data(profile: str, dataset: str) -> None:
    """Make (generated) or check (real) one dataset and write its manifest."""
    from mscs.datasets import build_dataset
    from mscs.datasets.toy import write_dataset
    from mscs.datasets.verify import verify
    from reproduce.baselines import colour_miou

    settings, params = read_json(resolved_path(profile))["datasets"][dataset], load_params()
    generated = settings["data_source"] == "generated"
    root = dataset_root(dataset, settings["data_source"], profile)
    if generated:
        counts = {split: settings[f"{split}_images"] for split in ("train", "val")}
        write_dataset(dataset, root, **counts, image_size=tuple(settings["image_size"]))
    facts = verify(params.spec(dataset), root, needed=params.splits_used(dataset))
    del facts["files"]  # they stay in the dataset's own manifest.json; the digest stands for them
    if generated:
        splits = (build_dataset(dataset, split, root, settings["task"]) for split in ("train", "val"))
        facts["colour_miou"] = colour_miou(*splits)
    write_json(RESULTS / profile / "data" / f"{dataset}.json", facts)


def train(profile: str, run: str, seed: str) -> int:
    """Train one seed of a run, or go on with it."""
    settings = read_resolved(resolved_path(profile), run)
    fresh = bool(os.environ.get("MSCS_FRESH"))
    argv = ["train", run, "--settings", str(resolved_path(profile)), "--seed", seed]
    job = Job(settings=settings, seeds=[int(seed)], folder=run, fresh=fresh)
    return launch.train(job, [*argv, *(["--fresh"] if fresh else [])])


def evaluate(profile: str, run: str, seed: str) -> None:
    """Score one seed of a run."""
    settings = read_resolved(resolved_path(profile), run)
    launch.evaluate(Job(settings=settings, seeds=[int(seed)], folder=run))


def tables(profile: str, table: str) -> None:
    """Write one table."""
    from reproduce.tables import write_table

    write_table(table, Results(profile))


def tsne(profile: str) -> None:
    """Draw Fig. 1."""
    from reproduce.tsne import write_tsne

    baseline, ours = (list(_trained(profile, run)) for run in TSNE_RUNS)
    write_tsne(baseline, ours, RESULTS / profile / "figures", Results(profile).stamp)


def qualitative(profile: str) -> None:
    """Draw Figs. 2 to 4."""
    from reproduce.qualitative import write_comparisons

    folder, stamp = RESULTS / profile / "figures", Results(profile).stamp
    facts = {}
    for figure, pair in Pipeline(load_params(), profile).pairs.items():
        baseline, ours = (next(_trained(profile, run)) for run in pair)
        facts[figure] = write_comparisons(figure, baseline, ours, folder, stamp)
    write_json(folder / "qualitative.json", facts)


def report(profile: str) -> None:
    """Write report.html."""
    from reproduce.report import write_report

    write_report(Results(profile))


VERBS: dict[str, Callable[..., int | None]] = {
    stage.__name__: stage for stage in (resolve, data, train, evaluate, tables, tsne, qualitative, report)
}


def _trained(profile: str, run: str) -> "Iterator[TrainedRun]":
    """Yield the networks of a run, seed by seed; the weights of a seed are needed when it is asked for."""
    from mscs.runs import check_weights
    from reproduce.trained import TrainedRun

    settings = read_resolved(resolved_path(profile), run)
    root = data_root(settings)
    launch.require_data(settings, root)
    for seed in settings.seeds:
        files = SeedFiles(profile, run, seed)
        check_weights(settings, seed, files)
        yield TrainedRun(settings, files.weights, root, run)


def run(argv: Sequence[str] | None = None) -> int:
    """Run one stage: here, in a container or as a Slurm job."""
    parser = argparse.ArgumentParser(prog="reproduce/stage", description=__doc__)
    parser.add_argument("verb", choices=sorted(VERBS))
    parser.add_argument("profile")
    parser.add_argument("names", nargs="*")
    parser.set_defaults(handler=_run)
    return run_command(parser, argv)


def _run(args: argparse.Namespace) -> int | None:
    if not resolved_path(args.profile).exists() and args.verb != "resolve":
        raise MscsError(f"{resolved_path(args.profile)} is missing; run `dvc repro resolve` first")
    runtime = runtime_of(args.profile, args.verb)
    if runtime != "native":
        start = run_in_container if runtime == "docker" else run_as_job
        return start(args.verb, args.profile, args.names)
    return VERBS[args.verb](args.profile, *args.names)


if __name__ == "__main__":
    sys.exit(run())
