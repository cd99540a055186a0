"""What each pipeline stage does. Called by reproduce/stage as `VERB PROFILE [NAME [SEED]]`, not by people.

A stage takes its settings from results/<profile>/resolved.json, the file its hash is made of, never from
params.yaml directly.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mscs import launch
from mscs.command_line import run_command
from mscs.datasets.spec import default_root
from mscs.errors import MscsError
from mscs.job import Job
from mscs.locks import locked
from mscs.params import load_params
from mscs.paths import (
    RESULTS,
    WORK,
    SeedFiles,
    data_root,
    dataset_root,
    read_resolved,
    resolve_all,
    resolved_path,
)
from mscs.results import read_json, write_json
from reproduce.cells import TSNE_RUNS
from reproduce.pipeline import Pipeline, starts_pinned
from reproduce.runtime import run_in_container, runtime_of, weights_folder
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


def fetch(profile: str, dataset: str) -> None:
    """Bring one real dataset, unless it is there, and write down what of it runs can count on."""
    from mscs.datasets.fetch import fetch

    params, root = load_params(), default_root(dataset)
    spec, needed = params.spec(dataset), params.splits_used(dataset)
    added = fetch(spec, root, needed=needed)
    print(f"{root}: {'added ' + ', '.join(added) if added else 'everything is there'}")
    splits = {split: count for split, count in spec.splits.items() if split in needed}
    facts = {"dataset": dataset, "home": spec.home, "splits": splits}
    write_json(_record(profile, "fetch", dataset), facts)


def weights(profile: str, backbone: str) -> None:
    """Bring the pinned weights of one backbone, unless they are there, and write down their SHA-256."""
    from mscs.models.pretrained import pretrained_record

    write_json(_record(profile, "weights", backbone), pretrained_record(backbone, True))


def data(profile: str, dataset: str) -> None:
    """Make (generated) or prepare and check (real) one dataset and write its manifest."""
    from mscs.datasets import build_dataset
    from mscs.datasets.toy import write_dataset
    from mscs.datasets.verify import verify
    from reproduce.baselines import colour_miou

    settings, params = read_json(resolved_path(profile))["datasets"][dataset], load_params()
    spec = params.spec(dataset)
    generated = settings["data_source"] == "generated"
    root = dataset_root(dataset, settings["data_source"], profile)
    if generated:
        counts = {split: settings[f"{split}_images"] for split in ("train", "val")}
        write_dataset(dataset, root, **counts, image_size=tuple(settings["image_size"]))
    if spec.prepare:
        spec.prepare(root)
    facts = verify(spec, root, needed=params.splits_used(dataset))
    del facts["files"]  # they stay in the dataset's own manifest.json; the digest stands for them
    if generated:
        splits = (build_dataset(dataset, split, root, settings["task"]) for split in ("train", "val"))
        facts["colour_miou"] = colour_miou(*splits)
    write_json(_record(profile, "data", dataset), facts)


def train(profile: str, run: str, seed: str) -> int:
    """Train one seed of a run, or go on with it."""
    settings = read_resolved(resolved_path(profile), run)
    fresh = bool(os.environ.get("MSCS_FRESH"))
    made = SeedFiles(profile, run, int(seed)).record
    start = _record(profile, "weights", settings.model.backbone)
    if starts_pinned(settings) and start.exists() and made.exists():
        other = read_json(made).get("pretrained_weights") != read_json(start)
        if other:  # it tells of a training that does not stand for this one any more
            made.unlink()
        fresh |= other
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
    stage.__name__: stage
    for stage in (resolve, fetch, weights, data, train, evaluate, tables, tsne, qualitative, report)
}


def restore(profile: str, verb: str, name: str) -> None:
    """Bring a real dataset (`data`) or pretrained weights (`weights`) that are recorded and not here.

    Records travel with git, and what they are about does not. A second process waits for the first.

    Raises:
        MscsError: what is here is something else than recorded; from now on the record is of that.
    """
    path = _record(profile, verb, name)
    drawn = (
        verb == "data" and read_json(resolved_path(profile))["datasets"][name]["data_source"] == "generated"
    )
    if drawn or not path.exists():  # a training draws it itself; the pipeline has not come to it
        return
    (WORK / profile).mkdir(parents=True, exist_ok=True)
    with locked(WORK / profile / f"{name}.lock", f"waiting for another process that brings {name}"):
        recorded = read_json(path)
        if _is_here(verb, name, recorded):
            return
        for step in ("fetch", "data") if verb == "data" else ("weights",):
            if code := _carry_out(step, profile, [name]):
                raise MscsError(f"`{step} {profile} {name}` ended with exit code {code}")
    if read_json(path) != recorded:
        raise MscsError(
            f"{name} is not what {path} said; it says now what is here. The same command again trains what "
            f"depends on it; to keep the results that are there, bring back the former files and the record"
        )


def _record(profile: str, verb: str, name: str) -> Path:
    """Return the file in which a stage writes down what it brought."""
    return RESULTS / profile / verb / f"{name}.json"


def _is_here(verb: str, name: str, recorded: Mapping[str, Any]) -> bool:
    if verb == "data":
        from mscs.datasets.base import MANIFEST

        manifest = default_root(name) / MANIFEST
        return manifest.is_file() and read_json(manifest).get("digest") == recorded["digest"]
    (digest,), folder = recorded.values(), weights_folder()
    # the hub's client names files by SHA-256; weights that come with a package are converted to one file
    return any(folder.glob(f"*/blobs/{digest}")) or (folder / f"{name}.safetensors").is_file()


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
    if args.verb in ("train", "evaluate"):
        settings = read_resolved(resolved_path(args.profile), args.names[0])
        restore(args.profile, "data", settings.data.name)
        if args.verb == "train" and starts_pinned(settings):
            restore(args.profile, "weights", settings.model.backbone)
    return _carry_out(args.verb, args.profile, args.names)


def _carry_out(verb: str, profile: str, names: Sequence[str]) -> int | None:
    runtime = runtime_of(profile, verb)
    if runtime != "native":
        start = run_in_container if runtime == "docker" else run_as_job
        return start(verb, profile, names)
    return VERBS[verb](profile, *names)


if __name__ == "__main__":
    sys.exit(run())
