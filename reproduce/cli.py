"""`python -m reproduce`: the pipeline by the names of tables, figures, runs and datasets, on top of DVC."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mscs.command_line import add_command, run_command
from mscs.errors import MscsError, UsageError, unknown_name
from mscs.params import load_params
from mscs.paths import RESULTS, resolved_path
from mscs.results import write_json
from reproduce.cells import TABLES, cells
from reproduce.pipeline import Pipeline, own_file, tables_of
from reproduce.rendering import markdown_table
from reproduce.stages import restore
from reproduce.tables import Results
from reproduce.workers import Places, repro, side_by_side, visible_gpus

GPU_ITEMS = ("tests", "loss", "memory", "step", "small", "training", "inference", "feed")
"""What `gpu` measures; `benchmarks.gpu_items` says how."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    return run_command(build_parser(), argv)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser with all subcommands."""
    parser = argparse.ArgumentParser(prog="python -m reproduce", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_pipeline(commands)
    _add_numerics(commands)
    _add_results(commands)
    _add_measurements(commands)
    return parser


def _add_pipeline(commands: Any) -> None:
    text = "bring tables, figures, runs or everything up to date"
    run = add_command(commands, "run", _run, text, profile=True)
    run.add_argument(
        "target",
        nargs="*",
        help="1a 1b 2a 2b 3, fig1 to fig4, a run's id, a dataset, rows (runs of Tables 4-7 without a cell) "
        "or all (default: all but rows)",
    )
    run.add_argument(
        "--keep-going", action="store_true", help="go on with what does not depend on a failed stage"
    )
    run.add_argument("--fresh", action="store_true", help="retrain from step 0 what has to be retrained")
    side = run.add_mutually_exclusive_group()
    side.add_argument("--gpus", type=int, metavar="N", help="share N GPUs among runs side by side")
    side.add_argument("--jobs", type=int, metavar="N", help="train N runs side by side, wherever they run")
    text = "GPUs of one run, with --gpus (default: a GPU per group of images)"
    run.add_argument("--gpus-per-run", type=int, metavar="M", help=text)

    text = "say what a target costs here, and start nothing"
    plan = add_command(commands, "plan", _plan, text, profile=True, as_json=True)
    plan.add_argument("target", nargs="*", help="as for run (default: all but rows)")
    plan.add_argument("--gpus", type=int, metavar="N", help="devices to plan for (default: those here)")
    plan.add_argument(
        "--device", metavar="NAME", help="plan for a GPU that was measured (default: what is here)"
    )
    plan.add_argument("--measure", action="store_true", help="time a few steps of each network here first")

    text = "write resolved.json, the settings of every run"
    add_command(commands, "resolve", _resolve, text, profile=True)
    text = "write every dvc.yaml from params.yaml and the tables"
    add_command(commands, "pipeline", _pipeline, text)


def _add_numerics(commands: Any) -> None:
    text = "record a changed unit of the code in numerics.yaml"
    accept = add_command(commands, "accept", _accept, text)
    accept.add_argument("unit", metavar="UNIT", nargs="+", help="a unit of numerics.yaml, or packages")
    how = accept.add_mutually_exclusive_group(required=True)
    how.add_argument("--same", action="store_true", help="if short trainings agree with the accepted state")
    how.add_argument("--changed", metavar="WHY", help="raise its version: runs that use it are stale")
    accept.add_argument(
        "--python", metavar="PATH", help="for packages --same: an interpreter with the accepted packages"
    )
    text = "compare trainings, settings, tables and refusals of a commit with the working tree"
    trees = add_command(commands, "compare-trees", _compare_trees, text)
    trees.add_argument("revision", metavar="REV", help="commit, branch or tag")
    trees.add_argument(
        "--cases", nargs="+", metavar="RUN", help="train these runs and compare nothing else (default: all)"
    )


def _add_results(commands: Any) -> None:
    text = "list every cell of Tables 1-3 and the run that fills it"
    add_command(commands, "cells", _cells, text, as_json=True)
    text = "rewrite the tables from the results that are there"
    tables = add_command(commands, "tables", _tables, text, profile=True)
    tables.add_argument("table", nargs="*", help="1a 1b 2a 2b 3, or 4 to 7 for the settings (default: all)")
    text = "rewrite report.html from the results that are there"
    add_command(commands, "report", _report, text, profile=True)
    text = "write model and data cards from the results that are there"
    add_command(commands, "cards", _cards, text, profile=True)

    text = "print where the sources disagree and what is taken"
    ledger = add_command(commands, "ledger", _ledger, text, as_json=True)
    ledger.add_argument("run", nargs="?", help="only what touches this run")
    ledger.add_argument(
        "--recipe", choices=("paper", "code", "upstream"), default="paper", help="default: paper"
    )

    text = "compare every cell and claim with the paper"
    add_command(commands, "verify", _verify, text, profile=True, as_json=True)
    text = "show what changed between two commits, and which cells moved"
    compare = add_command(commands, "compare", _compare, text, as_json=True)
    compare.add_argument(
        "first", metavar="REV_A", help="commit, branch, tag, DVC experiment, or . (working tree)"
    )
    compare.add_argument("second", metavar="REV_B", nargs="?", default=".", help="the same (default: .)")
    compare.add_argument("--profile", help="mini, small or paper (default: the one in params.yaml of REV_B)")


def _add_measurements(commands: Any) -> None:
    text = "measure the GPU memory of Table 2(a)'s rows, without any dataset"
    add_command(commands, "memory", _memory, text, profile=True)
    text = "measure everything that needs a GPU, as far as the minutes go; the next call goes on"
    gpu = add_command(commands, "gpu", _gpu, text)
    gpu.add_argument("item", nargs="*", help=f"{' '.join(GPU_ITEMS)} (default: all, in this order)")
    gpu.add_argument("--minutes", type=float, default=9.0, help="when to stop (default: %(default)g)")
    gpu.add_argument(
        "--out", type=Path, default=Path("work/gpu/out"), help="folder of results (default: %(default)s)"
    )
    gpu.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, Triton interpreted")

    text = "score a published checkpoint; without NAME list them"
    calibrate = add_command(commands, "calibrate", _calibrate, text)
    calibrate.add_argument("name", metavar="NAME", nargs="?", help="which one")
    calibrate.add_argument("--weights", type=Path, metavar="PATH", help="its downloaded file")
    calibrate.add_argument("--data", type=Path, metavar="ROOT", help="folder of its dataset")
    calibrate.add_argument("--ss", action="store_true", help="single scale only")
    calibrate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def _results(args: argparse.Namespace) -> Results:
    """Return the results of the profile that was asked for, or of the current one."""
    params = load_params()
    profile = args.profile or params.profile
    if profile not in params.profiles:
        raise UsageError(unknown_name("profile", profile, params.profiles))
    return Results(profile)


def _print(document: Any, text: str, *, as_json: bool) -> None:
    print(json.dumps(document, indent=1) if as_json else text)


def _run(args: argparse.Namespace) -> int:
    results = _results(args)
    pipeline = Pipeline(results.params, results.profile)
    pipeline.check()
    stages, runs = pipeline.wanted(args.target)
    keep_going = args.keep_going
    environment = {**os.environ, **({"MSCS_FRESH": "1"} if args.fresh else {})}
    try:
        if pipeline.in_git and not all(map(pipeline.has_inputs, runs)):
            shared = repro(pipeline, "--keep-going", *pipeline.shared_stages(runs))
            subprocess.run(shared, check=False, env=environment)
            # what cannot be had stops only the runs that need it
            ready = [run for run in runs if pipeline.has_inputs(run)]
            if len(ready) < len(runs):
                keep_going = True
                print(f"left out, see above: {', '.join(sorted({*runs} - {*ready}))}", file=sys.stderr)
            runs = ready
        if (args.gpus, args.jobs, args.gpus_per_run) != (None, None, None):
            places = Places(args.gpus, args.jobs, args.gpus_per_run)
            code = side_by_side(pipeline, runs, places, keep_going=args.keep_going, environment=environment)
            if code and not args.keep_going:
                return code
        command = repro(pipeline, *(["--keep-going"] if keep_going else []), *stages)
        code = subprocess.run(command, check=False, env=environment).returncode
        for dataset in set(args.target).intersection(pipeline.datasets(pipeline.seeds)):
            if code == 0:  # its record may be here without it
                restore(results.profile, "data", dataset)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    if code == 0 and pipeline.own_file:
        _write_tables(results, tables_of(pipeline.default))
    page = results.root / "report.html"
    if code == 0 and page.exists() and (pipeline.own_file or "all" in args.target or not args.target):
        print(f"report: {page.resolve()}")
    return code


def _write_tables(results: Results, tables: Sequence[str]) -> None:
    """Write the tables and the report of a profile from the runs that have been trained so far."""
    from reproduce.report import write_report
    from reproduce.tables import write_table

    for table in tables:
        write_table(table, results)
    write_report(results)


def _plan(args: argparse.Namespace) -> None:
    from mscs import memory
    from reproduce import plan

    gpus = max(1, len(visible_gpus())) if args.gpus is None else args.gpus
    if gpus < 1:
        raise UsageError("--gpus takes a number from 1")
    results = _results(args)
    _, runs = Pipeline(results.params, results.profile).wanted(args.target)
    settings = [results.params.resolve(run, results.profile).settings for run in runs]
    if args.measure:
        plan.measure(settings)
    device = args.device or plan.device_name()
    fits = {run: memory.fit(results.params, run, results.profile, device) for run in runs}
    document = plan.document(plan.costs(settings, device), device, gpus, fits)
    _print(document, plan.text(document), as_json=args.json)


def _resolve(args: argparse.Namespace) -> None:
    from reproduce.stages import resolve

    profile = _results(args).profile
    resolve(profile, check=False)
    print(resolved_path(profile))


def _pipeline(_args: argparse.Namespace) -> None:
    params = load_params()
    for profile in params.profiles:
        if profile == params.profile or own_file(params, profile):
            pipeline = Pipeline(params, profile)
            pipeline.write()
            print(*pipeline.files())


def _accept(args: argparse.Namespace) -> None:
    from reproduce.numerics import accept_changed, accept_same

    params = load_params()
    if args.same:
        print(accept_same(params, args.unit, args.python))
        return
    for unit in args.unit:
        print(accept_changed(params, unit, args.changed))


def _compare_trees(args: argparse.Namespace) -> int:
    from reproduce.trees import compare_trees, described

    unexpected, intended = compare_trees(args.revision, args.cases)
    for pattern, count in intended.items():
        print(f"{pattern}: {count} differences on purpose")
    lines = (described(place, *values) for place, values in unexpected.items())
    print(*lines, f"{len(unexpected)} differences that are not on purpose", sep="\n")
    return int(bool(unexpected))


def _cells(args: argparse.Namespace) -> None:
    keys = ("table", "row", "column", "paper", "source", "run")
    rows = [{key: getattr(cell, key) for key in keys} for cell in cells()]
    shown = [["-" if row[key] is None else row[key] for key in keys if key != "source"] for row in rows]
    header = [key for key in keys if key != "source"]
    _print(rows, markdown_table(header, shown, aligned=True), as_json=args.json)


def _tables(args: argparse.Namespace) -> None:
    from reproduce.settings_tables import DATASETS, write_settings_table
    from reproduce.tables import write_table

    results = _results(args)
    known = [*TABLES, *DATASETS]
    for table in args.table or known:
        if table not in known:
            raise UsageError(unknown_name("table", table, known))
        (write_settings_table if table in DATASETS else write_table)(table, results)
    print(f"tables: {(results.root / 'tables').resolve()}")


def _report(args: argparse.Namespace) -> None:
    from reproduce.report import write_report

    print(f"report: {write_report(_results(args)).resolve()}")


def _cards(args: argparse.Namespace) -> None:
    from reproduce.cards import write_cards

    results = _results(args)
    print(f"{len(write_cards(results))} cards: {(results.root / 'cards').resolve()}")


def _ledger(args: argparse.Namespace) -> None:
    from reproduce import ledger

    params = load_params()
    if args.run is not None:
        params.run_info(args.run)
    rows = ledger.rows(args.run, args.recipe)
    text = f"recipe {args.recipe}: {params.about(args.recipe)}\n{ledger.text(rows, args.recipe)}"
    _print(rows, text, as_json=args.json)


def _verify(args: argparse.Namespace) -> int:
    from reproduce.verify import verify

    outcome = verify(_results(args))
    outcome.write()
    _print(outcome.document, outcome.markdown, as_json=args.json)
    return outcome.exit_code


def _compare(args: argparse.Namespace) -> None:
    from reproduce.compare import as_text, compare, open_revision

    with open_revision(args.first) as first, open_revision(args.second) as second:
        document = compare(first, second, args.profile)
    _print(document, as_text(document), as_json=args.json)


def _memory(args: argparse.Namespace) -> None:
    from reproduce.memory import measure_on_gpu

    path = _results(args).root / "memory.json"
    document = measure_on_gpu(load_params())
    write_json(path, document)
    for run, row in document["runs"].items():
        print(f"{run:42} dense {row['dense_gb']!s:>6}  this package {row['ours_gb']!s:>6} GiB")
    print(path)


def _gpu(args: argparse.Namespace) -> int:
    try:
        from benchmarks.gpu import measure
    except ModuleNotFoundError as error:
        if not str(error.name).startswith("benchmarks"):
            raise
        raise MscsError("benchmarks/gpu.py is missing; measure in a checkout of the project") from None
    for item in args.item:
        if item not in GPU_ITEMS:
            raise UsageError(unknown_name("item", item, GPU_ITEMS))
    if not args.minutes > 0:
        raise UsageError(f"--minutes {args.minutes:g}: accepted are numbers above 0")
    page, failures = measure(load_params(), args.out, args.minutes, args.item, dry_run=args.dry_run)
    print(f"page: {page}")
    return int(failures > 0)


def _calibrate(args: argparse.Namespace) -> int:
    from mscs.distributed import join_world
    from reproduce.calibrate import as_text, calibrate, find, listing

    if args.name is None:
        print(listing())
        return 0
    checkpoint = find(args.name)
    if args.weights is None or args.data is None:
        raise UsageError(f"give --weights and --data; the weights are at {checkpoint.url}")
    with join_world(args.device) as world:
        document = calibrate(
            checkpoint, args.weights, args.data, load_params(), world, multi_scale=not args.ss
        )
        if world.is_main:
            write_json(RESULTS / "calibration" / f"{args.name}.json", document)
            print(as_text(args.name, document))
    return int(not all(row["agrees"] for row in document["scores"].values()))
