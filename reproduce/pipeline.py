"""The DVC pipeline as data: which stages there are and what each depends on.

dvc.yaml and reproduce/rows/dvc.yaml are written from here (`python -m reproduce pipeline`) for the profile of
params.yaml: a stage must list every file it uses, and DVC has no way to look that up. A training or an
evaluation depends on its own settings in resolved.json, which hold the versions of the code that it uses
(numerics.yaml), and on its data; on no file of code.
"""

import ast
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mscs.datasets import DATASETS
from mscs.errors import UsageError, unknown_name
from mscs.params import Params
from mscs.results import write_text
from reproduce.cells import FIGURE_RUNS, TABLES, TSNE_RUNS, cells, table_runs

ROOT_FILE = Path("dvc.yaml")
ROWS_FILE = Path("reproduce/rows/dvc.yaml")
PROFILE = "${item.profile}"
RESULTS = f"results/{PROFILE}"
RESOLVED = f"{RESULTS}/resolved.json"
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
    """Return the runs of Tables 4-7 that fill no cell."""
    default = set(default_runs(params))
    return [run for run in params.runs if run not in default]


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
    """The stages for one profile of params.yaml."""

    def __init__(self, params: Params):
        self.params = params
        self.seeds = {run: params.resolve(run).settings.seeds for run in params.runs}
        self.default = default_runs(params)

    def files(self) -> dict[Path, dict[str, Any]]:
        """Return both pipeline files as documents."""
        rows = row_runs(self.params)
        datasets = self.datasets(self.default)
        others = [name for name in self.datasets(rows) if name not in datasets]
        root = {"resolve": _resolve(), "data": _data(datasets), **self._jobs(self.default)}
        root |= {f"tables_{table}": self._table(table) for table in TABLES}
        pairs = [run for pair in FIGURE_RUNS.values() for run in pair]
        root["tsne"] = self._figures("tsne", list(TSNE_RUNS), ["fig1"], "fig1.json")
        root["qualitative"] = self._figures("qualitative", pairs, list(FIGURE_RUNS), "qualitative.json")
        root["report"] = self._report()
        row_stages = {"data": _data(others), **self._jobs(rows)}
        for stage in row_stages.values():
            stage["wdir"] = "../.."
        for stage in (*root.values(), *row_stages.values()):
            # as it is: DVC would put a value of params.yaml into a shell command unchecked
            stage["matrix"] = {"profile": [self.params.profile], **stage["matrix"]}
        curves = [
            path.replace(PROFILE, self.params.profile) for path in self._results(self.default, "losses.csv")
        ]
        plot = {"template": "linear", "title": "loss", "x": "step", "y": dict.fromkeys(curves, "loss")}
        return {ROOT_FILE: {"stages": root, "plots": [{"losses": plot}]}, ROWS_FILE: {"stages": row_stages}}

    def write(self) -> None:
        """Write both pipeline files."""
        for path, document in self.files().items():
            write_text(path, render(document))

    def check(self) -> None:
        """Raise UsageError unless the files that are there fit params.yaml."""
        for path, document in self.files().items():
            if not path.exists() or yaml.safe_load(path.read_text()) != document:
                raise UsageError(
                    f"{path} does not fit params.yaml (profile {self.params.profile}, its runs and seeds); "
                    "write it anew with `python -m reproduce pipeline`"
                )

    def datasets(self, runs: Iterable[str]) -> list[str]:
        """Return the datasets of some runs, in order of appearance."""
        return list(dict.fromkeys(self.params.run_info(run)["dataset"] for run in runs))

    def stages_of(self, run: str) -> list[str]:
        """Return DVC's names of the stages of one run: train and evaluate, seed by seed."""
        dataset, home = self.params.run_info(run)["dataset"], _home(run in self.default)
        return [
            f"{home}{verb}_{dataset}_seed{seed}@{self.params.profile}-{run}"
            for seed in self.seeds[run]
            for verb in ("train", "evaluate")
        ]

    def data_stage(self, dataset: str) -> str:
        """Return DVC's name of the stage of a dataset."""
        return f"{_home(dataset in self.datasets(self.default))}data@{self.params.profile}-{dataset}"

    def wanted(self, targets: Sequence[str]) -> tuple[list[str], list[str]]:
        """Return DVC's names of the stages that some targets ask for, and the runs that these need trained.

        Without targets that is everything but the rows: no stage by name, the runs of the report. Raises
        UsageError for an unknown target.
        """
        profile = self.params.profile
        known = {table: ([f"tables_{table}@{profile}"], table_runs(table)) for table in TABLES}
        known["fig1"] = [f"tsne@{profile}"], list(TSNE_RUNS)
        known |= {figure: ([f"qualitative@{profile}"], list(pair)) for figure, pair in FIGURE_RUNS.items()}
        known["rows"] = [str(ROWS_FILE)], row_runs(self.params)
        known["report"] = [f"report@{profile}"], self.default
        known |= {dataset: ([self.data_stage(dataset)], []) for dataset in DATASETS}
        known |= {run: (self.stages_of(run)[1::2], [run]) for run in self.params.runs}
        for target in targets:
            if target not in known:
                raise UsageError(unknown_name("target", target, known))
        stages = [stage for target in targets for stage in known[target][0]]
        runs = [run for target in targets for run in known[target][1]]
        return stages, list(dict.fromkeys(runs)) if targets else self.default

    def _jobs(self, runs: list[str]) -> dict[str, Any]:
        """Return the train and evaluate stages, each a matrix over the runs of one dataset and seed.

        Neither a seed nor a run that is added changes the name of any other stage.
        """
        groups: dict[tuple[str, int], list[str]] = {}
        for run in runs:
            for seed in self.seeds[run]:
                groups.setdefault((self.params.run_info(run)["dataset"], seed), []).append(run)
        return {
            f"{verb}_{dataset}_seed{seed}": _job(verb, dataset, seed, members)
            for verb in ("train", "evaluate")
            for (dataset, seed), members in groups.items()
        }

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
        return _stage(
            "tables",
            table,
            deps=deps + self._results(table_runs(table), "evaluation.json"),
            outs=[_out(f"{path}.{kind}") for kind in ("md", "csv", "tex")],
            metrics=[_out(f"{path}.json")],
            **fields,
        )

    def _figures(self, verb: str, runs: list[str], figures: list[str], facts: str) -> dict[str, Any]:
        deps = own_code(f"reproduce.{verb}") + self._data_files(runs)
        return _stage(
            verb,
            deps=deps + [_weights(run, self.seeds[run][0]) for run in runs],
            params=[{RESOLVED: [f"runs.{run}.evaluate" for run in runs]}],
            outs=[f"{RESULTS}/figures/{figure}.{kind}" for figure in figures for kind in ("png", "pdf")],
            metrics=[_out(f"{RESULTS}/figures/{facts}")],
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
        return _stage("report", deps=deps, outs=[f"{RESULTS}/report.html"])


def render(document: dict[str, Any]) -> str:
    """Return a pipeline file's text."""
    return HEADER + yaml.dump(document, sort_keys=False, width=110, Dumper=_NoAliases)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _home(default: bool) -> str:
    """Return what DVC puts before the names of the stages of a file."""
    return "" if default else f"{ROWS_FILE}:"


def _out(path: str, **options: Any) -> dict[str, Any]:
    return {path: {"cache": False, **options}}


def _weights(run: str, seed: int) -> str:
    return f"work/{PROFILE}/runs/{run}/weights/seed-{seed}.safetensors"


def _stage(
    verb: str, *axes: str, deps: list[str], matrix: Mapping[str, list[str]] | None = None, **fields: Any
) -> dict[str, Any]:
    command = " ".join(["reproduce/stage", verb, PROFILE, *axes])
    return {"matrix": dict(matrix or {}), "cmd": command, "deps": sorted(deps), **fields}


def _resolve() -> dict[str, Any]:
    code = ["mscs/blocks.py", "mscs/numerics.py", "mscs/params.py", "mscs/paths.py", "mscs/settings.py"]
    return _stage("resolve", deps=["params.yaml", "numerics.yaml", *code], outs=[_out(RESOLVED)])


def _data(datasets: list[str]) -> dict[str, Any]:
    return _stage(
        "data",
        "${item.dataset}",
        deps=["mscs/datasets/toy.py", "mscs/datasets/verify.py", "mscs/datasets/${item.dataset}.py"],
        params=[{RESOLVED: ["datasets.${item.dataset}"]}],
        outs=[_out(f"{RESULTS}/data/${{item.dataset}}.json")],
        matrix={"dataset": datasets},
    )


def _job(verb: str, dataset: str, seed: int, runs: list[str]) -> dict[str, Any]:
    results, weights = f"{RESULTS}/runs/${{item.run}}/seed-{seed}", _weights("${item.run}", seed)
    fields: dict[str, Any] = {"params": [{RESOLVED: [f"runs.${{item.run}}.{verb}"]}]}
    deps = [f"{RESULTS}/data/{dataset}.json"]
    if verb == "train":
        fields["outs"] = [weights]
        fields["metrics"] = [_out(f"{results}/train.json")]
        fields["plots"] = [_out(f"{results}/losses.csv", x="step", y="loss")]
    else:
        deps.append(weights)
        fields["outs"] = [_out(f"{results}/confusion.json")]
        fields["metrics"] = [_out(f"{results}/evaluation.json")]
    return _stage(verb, "${item.run}", str(seed), deps=deps, matrix={"run": runs}, **fields)
