"""The DVC pipeline as data: which stages there are and what each depends on.

dvc.yaml and reproduce/rows/dvc.yaml are written from here (`python -m reproduce pipeline`), because a stage
must list every file it uses and DVC has no way to look that up; a test keeps the files in step.
"""

import ast
from pathlib import Path
from typing import Any

import yaml

from mscs.params import Params
from mscs.results import write_text
from reproduce.cells import TABLES, cells, table_runs

ROOT_FILE = Path("dvc.yaml")
ROWS_FILE = Path("reproduce/rows/dvc.yaml")
DATASETS = ("cityscapes", "ade20k", "pascal_context", "cadis")
TSNE_RUNS = ("cityscapes-upernet-r101-ce", "cityscapes-upernet-r101-ours")
FIGURE_RUNS = {
    "fig2": ("ade20k-upernet-swins-ce", "ade20k-upernet-swins-ours"),
    "fig3": ("cityscapes-hrnet-hr48-ce", "cityscapes-hrnet-hr48-ours"),
    "fig4": ("cadis-ocrnet-r50-ce", "cadis-ocrnet-r50-ours"),
}
LABELS = "mscs/datasets/labels.json"
PROFILE = "${item.profile}"
RESOLVED = f"results/{PROFILE}/resolved.json"
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


def imports_of(*modules: str) -> list[str]:
    """Return the files of all modules of ours that `modules` import, directly or not, and their own.

    Names imported from a package are followed to the submodule that the package takes them from, so that
    a lazy package costs a stage no dependency on what it does not use.
    """
    seen: set[str] = set()
    open_modules = list(modules)
    while open_modules:
        module = open_modules.pop()
        if module in seen or not module.startswith(("mscs", "reproduce")):
            continue
        seen.add(module)
        path = module_path(module)
        if path.name != "__init__.py":
            open_modules += _imported(ast.parse(path.read_text()))
    files = {str(module_path(module)) for module in seen}
    return sorted(files | ({LABELS} if "mscs/datasets/labels.py" in files else set()))


def module_path(module: str) -> Path:
    """Return the file of a module of ours."""
    path = Path(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def _imported(tree: ast.AST) -> list[str]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found += [_home(node.module, alias.name) for alias in node.names]
            found.append(node.module)
    return found


def _home(module: str, name: str) -> str:
    """Return the module that `from module import name` finally loads."""
    if not module.startswith(("mscs", "reproduce")):
        return module
    path = module_path(module)
    if path.name != "__init__.py":
        return module
    if (path.parent / f"{name}.py").exists() or (path.parent / name).is_dir():
        return f"{module}.{name}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
            return node.module
    return module


def build(params: Params) -> dict[Path, dict[str, Any]]:
    """Return both pipeline files as documents."""
    default, rows = default_runs(params), row_runs(params)
    datasets = list(dict.fromkeys(params.run_info(run)["dataset"] for run in default))
    others = [name for name in DATASETS if name not in datasets]
    root = {"resolve": _resolve(), "data": _data(datasets)}
    root |= _runs(params, default)
    root |= {f"tables_{table}": _table(params, table) for table in TABLES}
    root |= {"tsne": _tsne(), "qualitative": _qualitative(), "report": _report(default)}
    plots = [
        {
            "losses": {
                "template": "linear",
                "title": "loss",
                "x": "step",
                "y": {f"results/${{profile}}/runs/{run}/losses.csv": "loss" for run in default},
            }
        }
    ]
    row_stages = {"data": _data(others), **_runs(params, rows)}
    for stage in row_stages.values():
        stage["wdir"] = "../.."
    return {
        ROOT_FILE: {"stages": root, "plots": plots},
        ROWS_FILE: {"vars": ["../../params.yaml:profile"], "stages": row_stages},
    }


def write(params: Params) -> None:
    """Write both pipeline files."""
    for path, document in build(params).items():
        write_text(path, render(document))


def render(document: dict[str, Any]) -> str:
    """Return a pipeline file's text."""
    return HEADER + yaml.dump(document, sort_keys=False, width=110, Dumper=_NoAliases)


class _NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def _out(path: str, **options: Any) -> dict[str, Any]:
    return {path: {"cache": False, **options}}


def _stage(verb: str, *axes: str, deps: list[str], **fields: Any) -> dict[str, Any]:
    matrix: dict[str, Any] = {"profile": ["${profile}"]}
    return {
        "matrix": matrix,
        "cmd": " ".join(["reproduce/stage", verb, PROFILE, *axes]),
        "deps": sorted(deps),
        **fields,
    }


def _resolve() -> dict[str, Any]:
    deps = ["params.yaml", *imports_of("mscs.params")]
    return _stage("resolve", deps=deps, outs=[_out(RESOLVED)])


def _data(datasets: list[str]) -> dict[str, Any]:
    stage = _stage(
        "data",
        "${item.dataset}",
        deps=imports_of("mscs.datasets.toy", "mscs.datasets.verify", "reproduce.baselines"),
        params=[{RESOLVED: ["${item.dataset}"]}],
        outs=[_out(f"results/{PROFILE}/data/${{item.dataset}}.json")],
    )
    stage["matrix"]["dataset"] = datasets
    return stage


def _runs(params: Params, runs: list[str]) -> dict[str, Any]:
    """Return one train and one evaluate stage per dataset, each a matrix over its runs."""
    stages: dict[str, Any] = {}
    datasets = list(dict.fromkeys(params.run_info(run)["dataset"] for run in runs))
    for verb, module in (("train", "mscs.engine"), ("evaluate", "mscs.evaluation")):
        for dataset in datasets:
            stages[f"{verb}_{dataset}"] = stage = _job(verb, module, dataset)
            stage["matrix"]["run"] = [run for run in runs if params.run_info(run)["dataset"] == dataset]
    return stages


def _job(verb: str, module: str, dataset: str) -> dict[str, Any]:
    foreign = {str(module_path(f"mscs.datasets.{other}")) for other in DATASETS if other != dataset}
    code = [file for file in imports_of(module) if file not in foreign]
    results = f"results/{PROFILE}/runs/${{item.run}}"
    weights = f"work/{PROFILE}/runs/${{item.run}}/weights"
    fields: dict[str, Any] = {"params": [{RESOLVED: [f"${{item.run}}.{verb}"]}]}
    deps = [*code, f"results/{PROFILE}/data/{dataset}.json"]
    if verb == "train":
        fields["outs"] = [weights]
        fields["metrics"] = [_out(f"{results}/train.json")]
        fields["plots"] = [_out(f"{results}/losses.csv", x="step", y="loss")]
    else:
        deps.append(weights)
        fields["outs"] = [_out(f"{results}/confusion.json")]
        fields["metrics"] = [_out(f"{results}/evaluation.json")]
    return _stage(verb, "${item.run}", deps=deps, **fields)


def _table(params: Params, table: str) -> dict[str, Any]:
    folder = f"results/{PROFILE}/tables"
    deps = [*imports_of("reproduce.tables"), "reproduce/paper.yaml"]
    fields: dict[str, Any] = {}
    counted = {cell.run for cell in cells(table) if cell.run and cell.read == "parameters"}
    if counted:
        fields["params"] = sorted({f"models.{params.run_model(run)}" for run in counted})
    else:
        deps = [dep for dep in deps if not dep.startswith(("mscs/models", "mscs/datasets"))]
    deps += [f"results/{PROFILE}/runs/{run}/evaluation.json" for run in table_runs(table)]
    return _stage(
        "tables",
        table,
        deps=deps,
        outs=[_out(f"{folder}/{table}.{kind}") for kind in ("md", "csv", "tex")],
        metrics=[_out(f"{folder}/{table}.json")],
        **fields,
    )


def _figure_deps(module: str, runs: list[str]) -> list[str]:
    deps = imports_of(module)
    deps += [f"work/{PROFILE}/runs/{run}/weights" for run in runs]
    return deps + sorted({f"results/{PROFILE}/data/{run.split('-')[0]}.json" for run in runs})


def _tsne() -> dict[str, Any]:
    folder = f"results/{PROFILE}/figures"
    return _stage(
        "tsne",
        deps=_figure_deps("reproduce.tsne", list(TSNE_RUNS)),
        params=[{RESOLVED: list(TSNE_RUNS)}],
        outs=[f"{folder}/fig1.png", f"{folder}/fig1.pdf", f"{folder}/fig1-scales.png"],
        metrics=[_out(f"{folder}/fig1.json")],
    )


def _qualitative() -> dict[str, Any]:
    folder = f"results/{PROFILE}/figures"
    runs = [run for pair in FIGURE_RUNS.values() for run in pair]
    return _stage(
        "qualitative",
        deps=_figure_deps("reproduce.qualitative", runs),
        params=[{RESOLVED: runs}],
        outs=[f"{folder}/{figure}.{kind}" for figure in FIGURE_RUNS for kind in ("png", "pdf")],
        metrics=[_out(f"{folder}/qualitative.json")],
    )


def _report(runs: list[str]) -> dict[str, Any]:
    deps = [*imports_of("reproduce.report"), "reproduce/report.html.j2"]
    # the tables it shows are files by now: the networks behind Table 3's counts are no business of the report
    deps = [dep for dep in deps if not dep.startswith(("mscs/models", "mscs/datasets"))]
    deps += ["reproduce/paper.yaml", "reproduce/ledger.yaml", "params.yaml", RESOLVED]
    deps += [f"results/{PROFILE}/tables/{table}.{kind}" for table in TABLES for kind in ("json", "csv", "md")]
    figures = f"results/{PROFILE}/figures"
    deps += [f"{figures}/{name}" for name in ("fig1.png", "fig1-scales.png", "fig1.json", "qualitative.json")]
    deps += [f"{figures}/{figure}.png" for figure in FIGURE_RUNS]
    deps += sorted({f"results/{PROFILE}/data/{run.split('-')[0]}.json" for run in runs})
    for run in runs:
        deps += [f"results/{PROFILE}/runs/{run}/{name}" for name in ("evaluation.json", "losses.csv")]
    outs = [f"results/{PROFILE}/report.html", f"results/{PROFILE}/report.md"]
    return _stage("report", deps=deps, outs=outs)
