"""The DVC pipeline as data: which stages there are and what each depends on.

dvc.yaml and reproduce/rows/dvc.yaml are written from here (`python -m reproduce pipeline`) for the profile of
params.yaml: a stage must list every file it uses, and DVC has no way to look that up. A training or an
evaluation depends on its own settings in resolved.json, which hold the versions of the code that it uses
(numerics.yaml), on its data and pretrained weights; on no file of code. What brings real datasets and weights
has a small record as its out: the files themselves are never DVC's.

A profile that has not all runs (small) has a file of its own, reproduce/<profile>/dvc.yaml, beside those of
mini or paper. Its tables are no stages: they show what has been trained so far.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mscs.datasets import DATASETS
from mscs.errors import UsageError, unknown_name
from mscs.modules import own_files
from mscs.numerics import own_paths
from mscs.params import Params
from mscs.results import write_text
from mscs.settings import Settings
from reproduce.cells import FIGURE_RUNS, TABLES, TSNE_RUNS, cells, table_runs

ROOT_FILE = Path("dvc.yaml")
ROWS_FILE = Path("reproduce/rows/dvc.yaml")
PROFILE = "${item.profile}"
RESULTS = f"results/{PROFILE}"
RESOLVED = f"{RESULTS}/resolved.json"
RESOLVING = ("blocks", "modules", "numerics", "params", "paths", "settings")
"""Modules that make resolved.json."""
HEADER = """\
# Written by `python -m reproduce pipeline`; change reproduce/pipeline.py or params.yaml instead.
# Every stage goes through reproduce/stage, natively or in a container with the same hash. The profile is part
# of each stage's name, so that the lock entries of mini and paper live side by side.
"""


def default_runs(params: Params) -> list[str]:
    """Return the runs that fill a cell of Tables 1-3 or a figure, in the order of params.yaml."""
    wanted = {run for table in TABLES for run in table_runs(table)}
    wanted |= {*TSNE_RUNS, *(run for pair in FIGURE_RUNS.values() for run in pair)}
    return [run for run in params.runs if run in wanted]


def row_runs(params: Params) -> list[str]:
    """Return the additional runs of Tables 4-7, which fill no cell of Tables 1-3."""
    default = set(default_runs(params))
    return [run for run in params.runs if run not in default]


def own_file(params: Params, profile: str) -> Path | None:
    """Return the pipeline file of a profile that has one of its own, because it has not all runs."""
    return Path("reproduce") / profile / "dvc.yaml" if params.runs_of(profile) != params.runs else None


def tables_of(runs: Iterable[str]) -> list[str]:
    """Return the tables that show some of `runs`."""
    return [table for table in TABLES if not set(table_runs(table)).isdisjoint(runs)]


def starts_pinned(settings: Settings) -> bool:
    """Return whether a run starts from the pinned weights of its backbone, not from others or none."""
    return settings.model.pretrained is True and settings.model.initial_weights is None


def own_code(*modules: str) -> list[str]:
    """Return the files of this package that `modules` import, directly or not, and their own."""
    seen: set[Path] = set()
    waiting = [Path(*module.split(".")).with_suffix(".py") for module in modules]
    while waiting:
        path = waiting.pop()
        if path in seen or not path.exists():
            continue
        seen.add(path)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("reproduce"):
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
                waiting += [Path(*name.split(".")).with_suffix(".py") for name in names]
    return sorted(map(str, seen))


class Pipeline:
    """The stages for one profile, by default that of params.yaml."""

    def __init__(self, params: Params, profile: str | None = None):
        self.params, self.profile = params, profile or params.profile
        self.own_file = own_file(params, self.profile)
        runs = params.runs_of(self.profile)
        resolved = {run: params.resolve(run, self.profile) for run in runs}
        settings = {run: found.settings for run, found in resolved.items()}
        self.seeds = {run: found.seeds for run, found in settings.items()}
        self.modules = {path for found in resolved.values() for path in own_paths(found.values)}
        """Import paths of the user's own code that some run names."""
        self.backbone = {run: x.model.backbone for run, x in settings.items() if starts_pinned(x)}
        """Of the runs that start from the pinned weights of their backbone."""
        self.default = [run for run in default_runs(params) if run in runs]
        self.in_git = settings[[*self.default, *runs][0]].data.source == "real"
        """Whether data are real, so that they are fetched and results kept in git.

        Results from generated data differ between processors, so every checkout makes its own.
        """
        self.pairs = {figure: pair for figure, pair in FIGURE_RUNS.items() if set(pair) <= set(runs)}

    def files(self) -> dict[Path, dict[str, Any]]:
        """Return the pipeline files as documents."""
        if self.own_file:
            stages = {**self._runs(self.default), **self._figures()}
            return {self.own_file: {"stages": self._placed(stages, folder="../..")}}
        rows = row_runs(self.params)
        root = self._runs(self.default)
        root |= {f"tables_{table}": self._table(table) for table in TABLES}
        root |= {**self._figures(), "report": self._report()}
        row_stages = {**self._inputs(rows, self.default), **self._jobs(rows)}
        return {
            ROOT_FILE: {"stages": self._placed(root), **self._shown()},
            ROWS_FILE: {"stages": self._placed(row_stages, folder="../..")},
        }

    def _placed(self, stages: dict[str, Any], folder: str = "") -> dict[str, Any]:
        """Add to every stage its profile, and where the project lies as seen from the stage's file."""
        for stage in stages.values():
            # as it is: DVC would put a value of params.yaml into a shell command unchecked
            if "matrix" in stage:
                stage["matrix"] = {"profile": [self.profile], **stage["matrix"]}
            if folder:
                stage.get("do", stage)["wdir"] = folder
        return stages

    def _shown(self) -> dict[str, Any]:
        """Return the metrics and plots of the project: those of the profiles whose results are in git."""
        shown: dict[str, Any] = {"metrics": [], "plots": []}
        for profile in self.params.profiles:
            if own_file(self.params, profile):
                tables = tables_of(self.params.runs_of(profile))
                shown["metrics"] += [f"results/{profile}/tables/{table}.json" for table in tables]
        if self.profile == "paper":
            curves = [path.replace(PROFILE, "paper") for path in self._results(self.default, "losses.csv")]
            plot = {"template": "linear", "title": "loss", "x": "step", "y": dict.fromkeys(curves, "loss")}
            shown["plots"] = [{"losses": plot}]
        return {kind: found for kind, found in shown.items() if found}

    def write(self) -> None:
        """Write the pipeline files."""
        for path, document in self.files().items():
            write_text(path, render(document))

    def check(self) -> None:
        """Raise UsageError unless the files that are there fit params.yaml."""
        if not self.own_file and own_file(self.params, self.params.profile):
            raise UsageError(
                f"profile {self.params.profile} has a pipeline of its own: `python -m reproduce run "
                f"--profile {self.params.profile}`. params.yaml names a profile that has all runs"
            )
        for path, document in self.files().items():
            if not path.exists() or yaml.safe_load(path.read_text()) != document:
                raise UsageError(
                    f"{path} does not fit params.yaml (profile {self.profile}, its runs and seeds); "
                    "write it anew with `python -m reproduce pipeline`"
                )

    def dataset(self, run: str) -> str:
        """Return the dataset of a run."""
        return self.params.dataset_of(run, self.profile)

    def datasets(self, runs: Iterable[str]) -> list[str]:
        """Return the datasets of some runs, in order of appearance."""
        return list(dict.fromkeys(map(self.dataset, runs)))

    def backbones(self, runs: Iterable[str]) -> list[str]:
        """Return the backbones whose pinned weights some runs start from, in order of appearance."""
        return list(dict.fromkeys(self.backbone[run] for run in runs if run in self.backbone))

    def _home(self, default: bool = True) -> str:
        """Return what DVC puts before the names of the stages of a file."""
        file = self.own_file or (None if default else ROWS_FILE)
        return f"{file}:" if file else ""

    def shared_stages(self, runs: Iterable[str]) -> list[str]:
        """Return DVC's names of the stages that several runs share: settings, data and pretrained weights."""
        known, names = self.backbones(self.default), self.backbones(runs)
        weights = [f"{self._home(name in known)}weights@{self.profile}-{name}" for name in names]
        data = map(self.data_stage, self.datasets(runs))
        return [f"{self._home()}resolve@{self.profile}", *data, *weights]

    def has_inputs(self, run: str) -> bool:
        """Return whether the records of a run's data and pretrained weights are there."""
        names = [f"data/{self.dataset(run)}", *(f"weights/{name}" for name in self.backbones([run]))]
        return all(Path("results", self.profile, f"{name}.json").exists() for name in names)

    def stages_of(self, run: str) -> list[str]:
        """Return DVC's names of the stages of one run: train and evaluate, seed by seed."""
        home = self._home(run in self.default)
        return [
            f"{home}{verb}_{self.dataset(run)}_seed{seed}@{self.profile}-{run}"
            for seed in self.seeds[run]
            for verb in ("train", "evaluate")
        ]

    def data_stage(self, dataset: str) -> str:
        """Return DVC's name of the stage of a dataset."""
        stage = "data" if dataset in DATASETS else "own_data"
        return f"{self._home(dataset in self.datasets(self.default))}{stage}@{self.profile}-{dataset}"

    def wanted(self, targets: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return DVC's names of the stages that some targets ask for, and the runs that these need trained.

        Without targets that is everything but the rows: no stage by name (a profile's own file), the runs of
        the report. Raises UsageError for an unknown target.
        """
        profile, home = self.profile, self._home()
        known = {}
        for table in tables_of(self.seeds):
            runs = [run for run in table_runs(table) if run in self.seeds]
            made = [stage for run in runs for stage in self.stages_of(run)[1::2]]
            known[table] = (made if self.own_file else [f"tables_{table}@{profile}"]), runs
        known["fig1"] = [f"{home}tsne@{profile}"], list(TSNE_RUNS)
        known |= {
            figure: ([f"{home}qualitative@{profile}"], list(pair)) for figure, pair in self.pairs.items()
        }
        if not self.own_file:
            known["rows"] = [str(ROWS_FILE)], row_runs(self.params)
            known["report"] = [f"report@{profile}"], self.default
        known |= {dataset: ([self.data_stage(dataset)], []) for dataset in self.datasets(self.seeds)}
        known |= {run: (self.stages_of(run)[1::2], [run]) for run in self.seeds}
        every = [str(self.own_file)] if self.own_file else [str(ROOT_FILE), str(ROWS_FILE)]
        known["all"] = every, list(self.seeds)
        for target in targets:
            if target not in known and target.lower().startswith("tab"):  # the tables are named 2b and so on
                raise UsageError(unknown_name("table", target, tables_of(self.seeds)))
            if target not in known:
                raise UsageError(unknown_name(f"target of profile {profile}", target, known))
        stages = [stage for target in targets for stage in known[target][0]]
        runs = [run for target in targets for run in known[target][1]]
        if not targets:
            stages, runs = [str(self.own_file)] if self.own_file else [], self.default
        return stages, list(dict.fromkeys(runs))

    def _runs(self, runs: list[str]) -> dict[str, Any]:
        return {"resolve": self._resolve(), **self._inputs(runs), **self._jobs(runs)}

    def _inputs(self, runs: list[str], known: Sequence[str] = ()) -> dict[str, Any]:
        """Return the stages that bring what some runs need and the `known` ones do not."""
        there = {*self.datasets(known), *self.backbones(known)}
        datasets = [name for name in self.datasets(runs) if name not in there]
        backbones = [name for name in self.backbones(runs) if name not in there]
        own = [name for name in datasets if name not in DATASETS]
        fetched = f"{RESULTS}/fetch/${{item.dataset}}.json"
        source = fetched if self.in_git else "mscs/datasets/toy.py"
        deps = ["mscs/datasets/verify.py", "mscs/datasets/${item.dataset}.py", source]
        own_deps = ["mscs/datasets/verify.py", "mscs/datasets/folders.py", fetched]
        settings = {"params": [{RESOLVED: ["datasets.${item.dataset}"]}]}
        stages = {
            "fetch": _input("fetch", "dataset", datasets if self.in_git else own, [], **settings),
            "data": _input(
                "data", "dataset", [name for name in datasets if name in DATASETS], deps, **settings
            ),
            "own_data": _input("data", "dataset", own, own_deps, **settings),
            "weights": _input("weights", "backbone", backbones, ["mscs/models/pretrained.py"]),
        }
        return {name: stage for name, stage in stages.items() if all(stage["matrix"].values())}

    def _jobs(self, runs: list[str]) -> dict[str, Any]:
        """Return the train and evaluate stages, each a matrix over the runs of one dataset and seed.

        Neither a seed nor a run that is added changes the name of any other stage.
        """
        groups: dict[tuple[str, int], list[str]] = {}
        for run in runs:
            for seed in self.seeds[run]:
                groups.setdefault((self.dataset(run), seed), []).append(run)
        return {
            f"{verb}_{dataset}_seed{seed}": self._job(verb, dataset, seed, members)
            for verb in ("train", "evaluate")
            for (dataset, seed), members in groups.items()
        }

    def _job(self, verb: str, dataset: str, seed: int, runs: list[str]) -> dict[str, Any]:
        results, weights = f"{RESULTS}/runs/${{item.run}}/seed-{seed}", _trained("${item.run}", seed)
        deps = [f"{RESULTS}/data/{dataset}.json"]
        if verb == "train":
            # they stay in place when the stage runs, which takes what `mscs train` made for what it makes
            stays = {"persist": True}
            curve = _out(f"{results}/losses.csv", x="step", y="loss", **stays)
            made = self._made([{weights: stays}], [_out(f"{results}/train.json", **stays)], [curve])
        else:
            deps.append(weights)
            made = self._made([_out(f"{results}/confusion.json")], [_out(f"{results}/evaluation.json")])
        params = [{RESOLVED: [f"runs.${{item.run}}.{verb}"]}]
        stage = _stage(verb, "${item.run}", str(seed), deps=deps, matrix={"run": runs}, params=params, **made)
        return self._from_weights(stage) if verb == "train" and self.backbones(runs) else stage

    def _from_weights(self, stage: dict[str, Any]) -> dict[str, Any]:
        """Let each run of a stage depend on the record of the weights that it starts from.

        The axes of a matrix are independent, so it cannot say that; a loop can, and gives the same names. Its
        runs have equally many dependencies: one that starts from no pinned weights names its data twice.
        """
        items = {}
        for run in stage.pop("matrix")["run"]:
            pinned = run in self.backbone
            start = f"weights/{self.backbone[run]}" if pinned else f"data/{self.dataset(run)}"
            items[f"{self.profile}-{run}"] = {"profile": self.profile, "run": run, "start": start}
        stage["deps"].append(f"{RESULTS}/${{item.start}}.json")
        return {"foreach": items, "do": stage}

    def _made(self, outs: list[Any], metrics: list[Any], plots: Sequence[Any] = ()) -> dict[str, Any]:
        """Return what a stage makes. Metrics and plots are those of profile paper only: see `_shown`."""
        if self.profile == "paper":
            return {"outs": outs, "metrics": metrics, **({"plots": list(plots)} if plots else {})}
        plain = [
            {path: {key: options[key] for key in ("cache", "persist") if key in options}}
            for found in (*metrics, *plots)
            for path, options in found.items()
        ]
        return {"outs": [*outs, *plain]}

    def _resolve(self) -> dict[str, Any]:
        deps = ["params.yaml", "numerics.yaml", *(f"mscs/{name}.py" for name in RESOLVING)]
        here = Path.cwd().resolve()
        files = {file for path in self.modules for file in own_files(path) if file.is_relative_to(here)}
        return _stage(
            "resolve", deps=deps + [str(file.relative_to(here)) for file in files], outs=[_out(RESOLVED)]
        )

    def _results(self, runs: Iterable[str], name: str) -> list[str]:
        return [f"{RESULTS}/runs/{run}/seed-{seed}/{name}" for run in runs for seed in self.seeds[run]]

    def _data_files(self, runs: Iterable[str]) -> list[str]:
        return [f"{RESULTS}/data/{dataset}.json" for dataset in self.datasets(runs)]

    def _table(self, table: str) -> dict[str, Any]:
        path = f"{RESULTS}/tables/{table}"
        deps = [*own_code("reproduce.tables"), "reproduce/paper.yaml"]
        counted = {cell.run for cell in cells(table) if cell.run and cell.read == "parameters"}
        models = sorted({f"models.{self.params.run_model(run)}" for run in counted})
        fields: dict[str, Any] = {"params": models} if models else {}
        outs = [_out(f"{path}.{kind}") for kind in ("md", "csv", "tex")]
        return _stage(
            "tables",
            table,
            deps=deps + self._results(table_runs(table), "evaluation.json"),
            **self._made(outs, [_out(f"{path}.json")]),
            **fields,
        )

    def _figures(self) -> dict[str, Any]:
        pairs = [run for pair in self.pairs.values() for run in pair]
        return {
            "tsne": self._figure("tsne", TSNE_RUNS, ["fig1"], "fig1.json"),
            "qualitative": self._figure("qualitative", pairs, self.pairs, "qualitative.json"),
        }

    def _figure(self, verb: str, runs: Sequence[str], figures: Iterable[str], facts: str) -> dict[str, Any]:
        """Return the stage of some figures: of the first seed, but for the numbers of Fig. 1, of all."""
        seeds = [(run, seed) for run in runs for seed in self.seeds[run][: None if verb == "tsne" else 1]]
        deps = own_code(f"reproduce.{verb}") + self._data_files(runs)
        pictures = [f"{RESULTS}/figures/{figure}.{kind}" for figure in figures for kind in ("png", "pdf")]
        return _stage(
            verb,
            deps=deps + [_trained(run, seed) for run, seed in seeds],
            params=[{RESOLVED: [f"runs.{run}.evaluate" for run in runs]}],
            **self._made([_out(path) for path in pictures], [_out(f"{RESULTS}/figures/{facts}")]),
        )

    def _report(self) -> dict[str, Any]:
        deps = [*own_code("reproduce.report"), "reproduce/report.html.j2"]
        deps += ["reproduce/paper.yaml", "reproduce/ledger.yaml", "params.yaml", RESOLVED]
        deps += [f"{RESULTS}/tables/{table}.{kind}" for table in TABLES for kind in ("json", "csv", "md")]
        pictures = [f"{figure}.png" for figure in ("fig1", *FIGURE_RUNS)]
        deps += [f"{RESULTS}/figures/{name}" for name in (*pictures, "fig1.json", "qualitative.json")]
        deps += self._data_files(self.default)
        deps += [
            path for name in ("evaluation.json", "losses.csv") for path in self._results(self.default, name)
        ]
        return _stage("report", deps=deps, outs=[_out(f"{RESULTS}/report.html")])


def render(document: dict[str, Any]) -> str:
    """Return a pipeline file's text."""
    return HEADER + yaml.dump(document, sort_keys=False, width=110, Dumper=_NoAliases)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _out(path: str, **options: Any) -> dict[str, Any]:
    return {path: {"cache": False, **options}}


def _trained(run: str, seed: int) -> str:
    return f"work/{PROFILE}/runs/{run}/weights/seed-{seed}.safetensors"


def _stage(
    verb: str, *axes: str, deps: list[str], matrix: Mapping[str, list[str]] | None = None, **fields: Any
) -> dict[str, Any]:
    command = " ".join(["reproduce/stage", verb, PROFILE, *axes])
    return {"matrix": dict(matrix or {}), "cmd": command, "deps": sorted(deps), **fields}


def _input(verb: str, axis: str, names: list[str], deps: list[str], **fields: Any) -> dict[str, Any]:
    """Return the stage that brings what runs need, with a record of each."""
    name = f"${{item.{axis}}}"
    outs = [_out(f"{RESULTS}/{verb}/{name}.json")]
    return _stage(verb, name, deps=deps, matrix={axis: names}, **fields, outs=outs)
