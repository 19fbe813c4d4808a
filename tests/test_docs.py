"""The documents keep up with the code: links, paths, commands, and figures from results files."""

import ast
import inspect
import json
import re
import shlex
import warnings

import pytest
from jsonargparse import ArgumentError, ArgumentParser
from paths import ROOT

from peagle import cli, shipped_configs
from peagle.__main__ import COMMANDS

PAGES = [
    *(ROOT / f"{name}.md" for name in ("README", "CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted(ROOT.glob("docs/*.md")),
    ROOT / "benchmarks" / "README.md",
    ROOT / "tests" / "README.md",
    ROOT / "peagle" / "tiny_target" / "README.md",
]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
FILE = re.compile(
    r"(?:peagle|tests|configs|callbacks|benchmarks|docs|model_cards)/[\w./-]*\.(?:py|yaml|md|json)"
)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def prose(page):
    return FENCE.sub("", page.read_text())


def anchors(page):
    """Of a page's headings, as GitHub makes them."""
    found = []
    for heading in re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE):
        slug = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        found.append(f"{slug}-{found.count(slug)}" if slug in found else slug)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_somewhere(page):
    for link in LINK.findall(prose(page)):
        if not link.startswith(("http:", "https:")):
            path, _, anchor = link.partition("#")
            goal = page.parent / path if path else page
            assert goal.exists(), link
            assert not anchor or anchor in anchors(goal), link


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_file_that_is_named_exists(page):
    named = [span for span in SPAN.findall(prose(page)) if FILE.fullmatch(span)]
    assert [span for span in named if not (ROOT / span).exists()] == []


def test_the_readme_is_short_and_the_index_names_every_page():
    assert len((ROOT / "README.md").read_bytes()) <= 10_000
    index = ROOT / "docs" / "README.md"
    linked = set(LINK.findall(index.read_text()))
    assert {path.name for path in ROOT.glob("docs/*.md")} - {"README.md"} <= linked


def commands(page):
    """Lines of code blocks, continued ones as one, and code in the text."""
    for _, block in FENCE.findall(page.read_text()):
        yield from block.replace("\\\n", " ").splitlines()
    yield from SPAN.findall(prose(page))


def lines_with(pattern):
    """Arguments of each command that matches, and the page it stands on."""
    found = []
    for page in PAGES:
        for line in commands(page):
            match = re.match(r"(?:[A-Z_]+=\S+ )*" + pattern, line.strip().lstrip("# "))
            if match:
                arguments = shlex.split(match[1].removesuffix("&"))
                found.append(pytest.param(arguments, id=f"{page.name}: {' '.join(arguments)}"))
    return found


class ParseOnly(cli.PlanCLI):
    """Reads a command line and does nothing."""

    def _run_subcommand(self, subcommand):
        ParseOnly.built = self.parser


@pytest.fixture(scope="module")
def lightning_parser():
    """The parser of fit, validate and test; with the two options that only plan has."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.chdir(ROOT)
        patch.setattr("sys.argv", ["peagle"])
        warnings.simplefilter("ignore")  # Lightning 2.6 uses what jsonargparse will drop
        cli.lightning(ParseOnly, ["fit", "--config", "configs/quickstart.yaml"])
    return ParseOnly.built


def only_parse(component, args, as_positional, exit_on_error):
    """In the place of ``auto_cli``; raises ``ArgumentError`` for what the component lacks."""
    parser = ArgumentParser(exit_on_error=exit_on_error)
    is_class = inspect.isclass(component)
    add = parser.add_class_arguments if is_class else parser.add_function_arguments
    add(component, as_positional=as_positional)
    parser.parse_args(args)
    raise SystemExit  # the command itself is not run


PEAGLE = lines_with(r"(?:\.venv/bin/)?python -m peagle (?!-)(.*)")


@pytest.mark.parametrize("arguments", PEAGLE)
def test_every_peagle_command_parses(arguments, lightning_parser, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    command, *options = arguments
    assert command in COMMANDS
    if not options:  # the mere name of a command
        return
    if command == "configs":
        monkeypatch.chdir(tmp_path)
        shipped_configs.run(options)
        return
    if command in ("export", "publish", "bench"):
        monkeypatch.setattr(cli, "auto_cli", only_parse)
        with pytest.raises(SystemExit):
            cli.run(command, arguments)
        return
    assert command == "plan" or not {"--answers", "--seconds"} & set(options)
    options = ["configs/quickstart.yaml" if option == "C" else option for option in options]
    subcommand = "fit" if command in ("capture", "plan") else command
    lightning_parser.parse_args(shipped_configs.with_files([subcommand, *options]))


def test_a_wrong_command_would_be_found(lightning_parser, monkeypatch):
    assert len(PEAGLE) > 20
    monkeypatch.chdir(ROOT)
    for wrong in (["--model.no_such", "1"], ["--data.max_rows", "many"]):
        with pytest.raises((ArgumentError, SystemExit)):
            lightning_parser.parse_args(["fit", "--config", "configs/quickstart.yaml", *wrong])
    monkeypatch.setattr(cli, "auto_cli", only_parse)
    with pytest.raises(ArgumentError):
        cli.run("export", ["export", "--checkpoint", "P", "--out", "D"])


def options_of(path):
    """What a script, and the scripts that it imports, add to their parsers."""
    tree, found = ast.parse(path.read_text()), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "add_argument":
            found |= {a.value for a in node.args if isinstance(a, ast.Constant)}
        if isinstance(node, ast.ImportFrom) and (path.parent / f"{node.module}.py").exists():
            found |= options_of(path.parent / f"{node.module}.py")
    return found


@pytest.mark.parametrize("arguments", lines_with(r"(?:python )?(benchmarks/\w+\.py.*)"))
def test_every_benchmark_command_has_its_script_and_options(arguments):
    script, *options = arguments
    assert {o for o in options if o.startswith("--")} <= options_of(ROOT / script)


@pytest.mark.parametrize("arguments", lines_with(r"make (?!sure)(.*)"))
def test_every_make_command_has_its_goal(arguments):
    text = (ROOT / "Makefile").read_text()
    for word in arguments:
        name, is_variable, _ = word.partition("=")
        pattern = rf"^{name} \?=" if is_variable else rf"^{name}:"
        assert re.search(pattern, text, re.MULTILINE), word


def rows_of_results(name):
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())["rows"]


def table_rows(page, header):
    """The cells of the table that begins with a header line."""
    lines = page.read_text().split(header)[1].splitlines()[2:]
    while lines and lines[0].startswith("|"):
        yield [cell.strip() for cell in lines.pop(0).strip("|").split("|")]


SPEED = list(table_rows(ROOT / "docs/performance.md", "| n | precision | family | peagle |"))


@pytest.mark.parametrize("cells", SPEED, ids=" ".join)
def test_the_speeds_are_those_of_the_results_files(cells):
    n, precision, family, ours, theirs, ratio, memory = cells
    dtype, _, segments = precision.partition(", ")

    def pick(name, **wanted):
        (row,) = [
            row
            for row in rows_of_results(name)
            if row["machine"].get("processor_family") == family
            and all(row[key] == value for key, value in wanted.items())
        ]
        return row

    n = int(n.replace(",", ""))
    if ratio:
        row = pick("against_speculators", n=n, dtype={"bf16": "bfloat16"}.get(dtype, dtype))
        assert theirs == f"{row['peer_tokens_per_second']:.0f} tok/s"
        assert ratio == f"{row['ratio']:.1f}x"
        assert memory == f"{row['peak_memory_gb']:.2f} / {row['peer_peak_memory_gb']:.2f} GB"
    else:
        wanted = {"dtype": {"float32": "fp32"}.get(dtype, dtype), "n": n}
        row = pick("training_step_cpu", segments=int(segments.split()[0]), **wanted)
        assert memory == f"{row['peak_memory_gb']:.2f} GB"
    assert ours == f"{row['tokens_per_second']:.0f} tok/s"


LATENCY = list(table_rows(ROOT / "docs/eagle3.md", "| drafter | layers | K = 1 |"))


@pytest.mark.parametrize("cells", LATENCY, ids=" ".join)
def test_the_times_of_a_round_are_those_of_the_results_file(cells):
    method, layers, *times, ratio = cells
    rows = {(r["method"], r["layers"], r["k"]): r for r in rows_of_results("draft_latency")}
    for k, text in zip((1, 7), times, strict=True):
        row = rows[method.lower().replace("eagle-3", "eagle3"), int(layers), k]
        assert float(text) == pytest.approx(row["ms_per_round"], rel=0.003)
    assert float(ratio) == pytest.approx(row["ratio"], rel=0.01)


QUALITY = list(table_rows(ROOT / "benchmarks/README.md", "| drafter | layers | K = 3 |"))


@pytest.mark.parametrize("cells", QUALITY[:2], ids=" ".join)
def test_acceptance_lengths_are_those_of_the_results_file(cells):
    recipe = {"ours, the default recipe": "default", "EAGLE-3 (K passes)": "eagle3"}[cells[0]]
    for k, cell in zip((3, 5, 7), cells[2:], strict=True):
        lengths = {
            row["seed"]: f"{row['acceptance_length']:.3f}"
            for row in rows_of_results("quality")
            if (row["recipe"], row["steps"], row["k"]) == (recipe, 500, k)
            and row.get("temperature", 0) == 0
        }
        assert cell == f"{lengths[0]} / {lengths[1]}"
