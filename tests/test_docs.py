"""README and docs/ keep their word: links, paths, names, commands and Python blocks are all checked.

Commands are parsed by the programs' own parsers. Those that only print or write small files are run, in an
empty folder with the settings; those that read the history run in a clone, those that train mini or measure
in a copy with a still smaller mini (both slow). What needs real data, weights or a GPU is only parsed; the
containers have tests of their own. A Python block that takes seconds says ```python slow; one that says
```python torchrun runs in two processes.
"""

import ast
import contextlib
import importlib
import io
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import yaml

from mscs.cli import build_parser
from mscs.cli import main as mscs_main
from mscs.datasets.registry import DATASETS, dataset_spec
from mscs.params import load_params, parse_overrides
from reproduce import calibrate, ledger, pipeline, tables
from reproduce.cells import TABLES
from reproduce.cli import build_parser as build_reproduce_parser
from reproduce.cli import main as reproduce_main

ROOT = Path(__file__).parents[1]
PAGES = [page for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))) if page.exists()]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
FILE = re.compile(r"[\w.<>*-]+(/[\w.<>*+-]+)*/?")
SUFFIXES = (
    *(".py", ".yaml", ".yml", ".md", ".json", ".lock", ".toml", ".csv", ".html", ".tex", ".sh", ".cff"),
    *(".safetensors", ".pt", ".pdf", ".png"),
)
GENERATED = (
    "results",
    "work",
    "data",
    "benchmarks/results",
)  # what the project writes; not in git, or only once it has run
SCRIPT = "docs/own-data.md"
"""Whose commands are of runs that the page adds: tests/test_own_data.py runs all of them."""
PLACEHOLDERS = {
    "RUN": "cityscapes-hrnet-hr48-ours",
    "DATASET": "ade20k",
    "NAME": "ade20k",
    "PROFILE": "paper",
    "STAGE": "tables_2b@mini",
}
PROGRAMS = ("mscs", "make", "dvc", "python", ".venv/bin/python", "docker")
UNCHECKED = {"bash", "cd", "export", "git", "pip", "kill", "docker", "sudo", "wait"}
RUNNABLE = {
    "mscs": {"runs", "show", "--help", "--version"},
    "reproduce": {"cells", "ledger", "tables", "verify", "cards", "resolve", "--help"},
}
IN_COPY = {
    ("mscs", "train"),
    ("mscs", "evaluate"),
    ("reproduce", "run"),
    ("reproduce", "plan"),
    ("reproduce", "report"),
    ("dvc", "status"),
    ("dvc", "repro"),
}
FEW = {
    "benchmarks/models.py": ["--rows", "cadis"],
    "benchmarks/step.py": ["--rows", "cadis", "--variants", "fp32 plain"],
}
IN_CLONE = {("dvc", "params"), ("dvc", "metrics"), ("reproduce", "compare")}


@dataclass(frozen=True)
class Command:
    """A command of a page: its words without assignments, and whether it stands inside a sentence."""

    page: str
    words: tuple[str, ...]
    inline: bool

    def __str__(self):
        return f"{self.page}: {' '.join(self.words)}"

    @property
    def program(self):
        """The program's own name, `reproduce` for this project's second one."""
        return "reproduce" if self.words[1:3] == ("-m", "reproduce") else Path(self.words[0]).name

    @property
    def arguments(self):
        return list(self.words[3 if self.program == "reproduce" else 1 :])


def prose(page):
    return FENCE.sub("", (ROOT / page).read_text())


def code_spans(page):
    return re.findall(r"`([^`\n]+)`", prose(page))


def blocks(page, language):
    """Yield (info string, text) of the page's fenced blocks of a language."""
    for info, text in FENCE.findall((ROOT / page).read_text()):
        if info.split()[:1] == [language]:
            yield info, text


def words_of(line):
    """Return a shell line's words up to a pipe or &, without comment, assignments and brackets."""
    words = shlex.split(line, comments=True)
    end = next((i for i, word in enumerate(words) if word in ("|", "&", "&&", ";", ">")), len(words))
    words = [word.strip("[]") for word in words[:end]]
    words = [PLACEHOLDERS.get(word, word) for word in words]
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    return tuple(words)


def find_commands():
    found = []
    for page in NAMES:
        scripts = () if page == SCRIPT else blocks(page, "sh")
        lines = [line for _, text in scripts for line in text.replace("\\\n", " ").splitlines()]
        lines += [
            m[1] for m in re.finditer(r"^ {4}((?:mscs|python -m|make|dvc) .*)$", prose(page), re.MULTILINE)
        ]
        found += [Command(page, words_of(line), False) for line in lines if words_of(line)]
        for span in code_spans(page):
            if span.split()[0] in PROGRAMS and " " in span and "<" not in span:
                found.append(Command(page, words_of(span), True))
    return list(dict.fromkeys(found))


COMMANDS = find_commands()


@cache
def params():
    return load_params(ROOT / "params.yaml")


@cache
def source_text():
    """Return the text of the code, in which every generated file's name must occur."""
    files = [
        *ROOT.glob("mscs/**/*.py"),
        *ROOT.glob("reproduce/**/*.*"),
        *ROOT.glob("docker/*"),
        *ROOT.glob("benchmarks/*.py"),
    ]
    files += [ROOT / name for name in ("dvc.yaml", "Makefile", ".env", ".gitignore")]
    return "\n".join(f.read_text() for f in files if f.is_file() and f.suffix not in (".pyc", ".png"))


@cache
def tracked():
    return subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()


@cache
def stage_names():
    """Return DVC's name of every stage, group and file, in both profiles."""
    names = set()
    for path, document in pipeline.Pipeline(params()).files().items():
        prefix = "" if path == pipeline.ROOT_FILE else f"{path}:"
        names.add(str(path))
        for stage, body in document["stages"].items():
            axis = next((values for key, values in body["matrix"].items() if key != "profile"), None)
            ends = [""] if axis is None else [f"-{value}" for value in axis]
            names |= {
                prefix + stage,
                *(f"{prefix}{stage}@{p}{end}" for p in ("mini", "paper") for end in ends),
            }
    return names


def slug(heading):
    """Return the anchor that code hosts make of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", NAMES)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    assert [t for t in targets if not re.match(r"[a-z]+:", t) and not leads_somewhere(page, t)] == []


def leads_somewhere(page, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    if not anchor or not file.is_file():
        return file.exists()
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text()), flags=re.MULTILINE)
    return anchor in map(slug, headings)


def is_path(span):
    top = span.split("/")[0]
    return FILE.fullmatch(span) and (
        span.endswith(SUFFIXES)
        or span.endswith("/")
        or ("/" in span and (top in GENERATED or (ROOT / top).is_dir()))
    )


def path_exists(page, span):
    """Return whether a path is in the project, or is one that the project's code names and writes."""
    pattern = re.sub(r"<[^>]*>", "*", span.rstrip("/"))
    if not any(f"{span}/".startswith(f"{folder}/") for folder in GENERATED):
        found = [*ROOT.glob(pattern), *(ROOT / page).parent.glob(pattern)]
        if found or ("/" not in span and any(name.endswith(f"/{span}") for name in tracked())):
            return True
        if "/" in span and (ROOT / span.split("/")[0]).is_dir() and "*" not in pattern:
            return False
    pieces = [piece for part in pattern.split("/") for piece in re.split(r"\*|\.\w+$", part) if piece]
    return bool(pieces) and all(piece in source_text() for piece in pieces)


@pytest.mark.parametrize("page", NAMES)
def test_paths_exist(page):
    assert [s for s in code_spans(page) if is_path(s) and not path_exists(page, s)] == []


@pytest.mark.parametrize("page", NAMES)
def test_names_exist(page):
    """Run ids, modules with their members, and environment variables."""
    text = (ROOT / page).read_text()
    schedules = yaml.safe_load((ROOT / "params.yaml").read_text())["schedules"]
    for span in code_spans(page):
        if re.fullmatch(rf"({'|'.join(DATASETS)})-[a-z0-9-]+", span):
            assert span in params().runs or span in schedules, span
        if re.fullmatch(r"(mscs|reproduce)(\.\w+)+", span):
            assert resolves(span), span
    for name in set(re.findall(r"\bMSCS_[A-Z_]+", text)):
        assert re.search(rf"\b{name}\b", source_text()), name


def resolves(dotted):
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        try:
            for name in parts[count:]:
                found = getattr(found, name)
        except AttributeError:
            return False
        return True
    return False


def parse(parser, arguments, inline):
    """Parse with argparse, failing with its message; in a sentence a command's name may stand alone."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message), contextlib.redirect_stdout(io.StringIO()):
            return parser.parse_args(arguments)
    except SystemExit as end:
        if end.code in (0, None):
            return None
        if (
            inline
            and not any(word.startswith("-") for word in arguments)
            and "required" in message.getvalue()
        ):
            return parse(parser, [*arguments, "--help"], False)
        raise AssertionError(message.getvalue()) from None


def check_mscs(arguments, inline):
    args = parse(build_parser(), arguments, inline)
    if getattr(args, "run", None) is not None:
        params().resolve(args.run, args.profile, parse_overrides(getattr(args, "set", [])))
    if getattr(args, "dataset", None) is not None:
        dataset_spec(args.dataset)
    assert getattr(args, "profile", None) in (None, *params().profiles)


def check_reproduce(arguments, inline):
    args = parse(build_reproduce_parser(), arguments, inline)
    if args is None:
        return
    profile = getattr(args, "profile", None)
    stages, _ = pipeline.Pipeline(params(), profile).wanted(getattr(args, "target", ()))
    assert profile not in (None, "mini") or set(stages) <= stage_names()
    for table in getattr(args, "table", ()):
        assert table in (*TABLES, "4", "5", "6", "7")
    if getattr(args, "run", None) is not None:
        params().run_info(args.run)
    if getattr(args, "name", None) is not None:
        calibrate.find(args.name)
    assert getattr(args, "profile", None) in (None, *params().profiles)


def check_make(arguments, _inline):
    text = (ROOT / "Makefile").read_text()
    phony = re.search(r"^\.PHONY: (.*)$", text, flags=re.MULTILINE)[1].split()
    for word in arguments:
        name, assigned, _ = word.partition("=")
        assert f"$({name})" in text if assigned else word in phony, word


def check_dvc(arguments, inline):
    from dvc.cli.parser import get_main_parser

    args = parse(get_main_parser(), arguments, inline)
    if args is not None and args.cmd in ("repro", "status"):
        assert set(args.targets) <= stage_names()
    for change in getattr(args, "set_param", None) or ():
        found = yaml.safe_load((ROOT / "params.yaml").read_text())
        *parents, key = change.lstrip("+").partition("=")[0].split(".")
        for name in parents:
            found = found[name]
        assert (key in found) is not change.startswith("+"), change


def check_python(arguments, _inline):
    if arguments[0] == "-c":
        for node in ast.walk(ast.parse(arguments[1])):
            if isinstance(node, ast.ImportFrom):
                assert all(resolves(f"{node.module}.{alias.name}") for alias in node.names)
        return
    assert arguments[0].startswith("benchmarks/"), arguments
    text = (ROOT / arguments[0]).read_text()
    for word in arguments[1:]:
        assert not word.startswith("--") or f'"{word}"' in text, word


def check_docker(arguments, inline):
    if arguments[:2] != ["compose", "run"] or len(arguments) < 3:
        return
    services = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())["services"]
    service = services[arguments[2]]
    _, *inner = service["entrypoint"]
    words = (*inner, *(arguments[3:] or service["command"]))
    if words and words[:3] != ("python", "-m", "pytest"):
        check(Command("", words, inline))


CHECKS = {
    "mscs": check_mscs,
    "reproduce": check_reproduce,
    "make": check_make,
    "dvc": check_dvc,
    "python": check_python,
    "docker": check_docker,
}


def check(command):
    if command.program in CHECKS:
        CHECKS[command.program](command.arguments, command.inline)
    else:
        assert command.program in UNCHECKED, f"unknown program {command.program}"


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_command_is_accepted(command):
    check(command)


def runs_at_once(command):
    known = RUNNABLE.get(command.program, ())
    return bool(command.arguments) and command.arguments[0] in known and not command.inline


@pytest.mark.parametrize("command", filter(runs_at_once, COMMANDS), ids=str)
def test_harmless_command_runs(command, tmp_path, monkeypatch, capsys):
    for name in ("params.yaml", "numerics.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    main = {"mscs": mscs_main, "reproduce": reproduce_main}[command.program]
    try:
        code = main(command.arguments)
    except SystemExit as end:
        code = end.code
    output = capsys.readouterr()
    assert not code, output.err
    assert output.out


def needs_history(command):
    return not command.inline and (command.program, *command.arguments[:1]) in IN_CLONE


@pytest.fixture(scope="session")
def clone(tmp_path_factory):
    """Clone the project with its history."""
    folder = tmp_path_factory.mktemp("clone") / "project"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    known = subprocess.run(["git", "rev-parse", "-q", "--verify", "HEAD~1"], cwd=folder, capture_output=True)
    if known.returncode:
        pytest.skip("this copy of the project has no history")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", filter(needs_history, COMMANDS), ids=str)
def test_command_on_history_runs(command, clone):
    done = subprocess.run(
        [sys.executable, "-m", command.program, *command.arguments], cwd=clone, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def trains_or_measures(command):
    many = {"--gpus", "--jobs"}  # these want a machine for many trainings at once
    if command.inline or any("paper" in word or word in many for word in command.words):
        return False
    first = command.arguments[0] if command.arguments else ""
    measures = first.startswith("benchmarks/") and first != "benchmarks/camvid.py"  # that packs real data
    return (command.program, first) in IN_COPY or measures


@pytest.mark.slow
def test_commands_that_train_or_measure_run(copy_project):
    """In the order of the pages, because one needs what another trained."""
    project = copy_project(small=True)
    for command in filter(trains_or_measures, COMMANDS):
        words = command.arguments
        if words[0].startswith("benchmarks/"):
            words = [*words, "--quick", *FEW.get(words[0], ())]
        else:
            words = ["-m", command.program, *words]
        done = subprocess.run([sys.executable, *words], cwd=project, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def python_blocks():
    for page in NAMES:
        for index, (info, text) in enumerate(blocks(page, "python")):
            marks = [pytest.mark.slow] if "slow" in info.split() else []
            processes = 2 if "torchrun" in info.split() else 1
            yield pytest.param(page, text, processes, id=f"{page}-{index}", marks=marks)


@pytest.mark.parametrize(("page", "text", "processes"), python_blocks())
def test_python_block_runs(page, text, processes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if processes > 1:
        (tmp_path / "block.py").write_text(text)
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        done = subprocess.run([*launch, str(processes), "block.py"], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return
    exec(compile(text, page, "exec"), {"__name__": "__main__"})


def test_fences_are_of_known_kinds():
    """A block in another language would escape every check."""
    kinds = {
        info.split()[0] if info else ""
        for page in NAMES
        for info, _ in FENCE.findall((ROOT / page).read_text())
    }
    assert kinds <= {"sh", "python", "text", "yaml"}


def test_index_lists_every_page():
    text = (ROOT / "docs" / "README.md").read_text()
    for name in NAMES:
        if name.startswith("docs/") and name != "docs/README.md":
            assert f"]({Path(name).name})" in text, name


def test_fidelity_tells_every_ledger_entry_and_no_other():
    told = re.findall(
        r"^- \*\*([a-z0-9-]+)\*\*", (ROOT / "docs" / "fidelity.md").read_text(), flags=re.MULTILINE
    )
    assert sorted(told) == sorted(entry.id for entry in ledger.entries())


def test_fidelity_prints_the_tolerances_in_force():
    text = (ROOT / "docs" / "fidelity.md").read_text()
    rows = dict(re.findall(r"^\| (\w+) \| ([\d.]+) \|", text, flags=re.MULTILINE))
    assert {name: float(value) for name, value in rows.items()} == {
        **{name: spec.tolerance for name, spec in DATASETS.items() if spec.tolerance is not None},
        **calibrate.TOLERANCES,
        "parameters": tables.PARAMETER_TOLERANCE,
    }


def test_operations_quotes_messages_that_exist():
    text = (ROOT / "docs" / "operations.md").read_text()
    quoted = re.findall(r'^\| "([^"]+)" \|', text, flags=re.MULTILINE)
    code = re.sub(r'"\s+f?"', "", source_text())  # join literals that are broken over lines
    assert len(quoted) > 10
    assert [message for message in quoted if message not in code] == []


def test_reproduce_counts_runs_and_steps():
    text = (ROOT / "docs" / "costs.md").read_text()
    groups = {"default": pipeline.default_runs(params()), "rows": pipeline.row_runs(params())}
    for name, runs in groups.items():
        for dataset in DATASETS:
            found = [params().resolve(run, "paper").settings for run in runs]
            steps = [settings.schedule.steps for settings in found if settings.data.name == dataset]
            if steps:
                assert f"| {name} | {dataset} | {len(steps)} | {sum(steps) // 1000}K |" in text


def test_performance_names_every_benchmark_and_every_result():
    text = (ROOT / "docs" / "performance.md").read_text()
    patterns = [re.sub(r"<[^>]*>", "*", span) for span in re.findall(r"`(benchmarks/results/[^`]+)`", text)]
    scripts = [name for name in tracked() if re.fullmatch(r"benchmarks/\w+\.py", name)]
    assert scripts
    assert [name for name in scripts if name not in text] == []
    for result in (ROOT / "benchmarks" / "results").glob("*.md"):
        assert any(result.relative_to(ROOT).match(pattern) for pattern in patterns), result.name


def test_readme_shows_the_results_of_profile_small():
    lines = (ROOT / "README.md").read_text().splitlines()
    shown = [[x.strip() for x in line.split("|")[2:5]] for line in lines if re.match(r"\| (mIoU|5-NN)", line)]
    results = tables.Results("small", ROOT / "results")
    expected = []
    for network in ("hrnet-hr48", "upernet-r101"):
        pair = [results.score(f"cityscapes-{network}-{loss}", "ss") for loss in ("ce", "ours")]
        assert pair[0].n == pair[1].n
        expected.append([str(pair[0].n), *(f"{score.number:.1f} ± {score.std:.1f}" for score in pair)])
    separation = results.read("figures/fig1.json")
    for space in ("all scales", "scale 0, stride 4"):
        pair = [separation[f"{word} the contrastive loss"][space] for word in ("without", "with")]
        texts = [f"{x['knn_accuracy']:.1f} ± {x['knn_accuracy_std']:.1f}" for x in pair]
        expected.append([str(expected[1][0]), *texts])
    assert shown == expected
