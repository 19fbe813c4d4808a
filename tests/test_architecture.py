"""Rules about the source itself: which folder imports which, and what must not occur."""

import ast
import re

import pytest
from paths import ROOT

# Each line imports only from lines above it.
ORDER = """
    cod store progress next_step quiet
    kernels
    card target
    publish
    model
    serve
    capture
    decode
    train
    bench plan tiny_target
    callbacks arguments mistakes preflight shipped_configs
    fit_cli
    cli
    __main__
"""
LEVEL = {name: n for n, line in enumerate(ORDER.split("\n")) for name in line.split()}
SOURCES = sorted([*ROOT.glob("peagle/**/*.py"), *ROOT.glob("callbacks/*.py")])
LIGHTNING = {"train/module.py", "train/datamodule.py", "preflight.py", "fit_cli.py", "cli.py"}


def name_of(path):
    return path.relative_to(ROOT).as_posix().removeprefix("peagle/")


def folder_of(path):
    return name_of(path).partition("/")[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


PEAGLE = [path for path in SOURCES if path.name != "__init__.py"]


@pytest.mark.parametrize("path", PEAGLE, ids=name_of)
def test_a_folder_imports_only_from_those_above_it(path):
    ours = folder_of(path)
    for name in imports_of(path):
        if name.startswith("peagle."):
            theirs = name.split(".")[1]
            assert theirs == ours or LEVEL[theirs] < LEVEL[ours], name


@pytest.mark.parametrize("path", PEAGLE, ids=name_of)
def test_only_the_outer_modules_know_lightning(path):
    if name_of(path) not in LIGHTNING and folder_of(path) != "callbacks":
        assert not any(name.split(".")[0] == "lightning" for name in imports_of(path))


def test_only_the_publisher_talks_to_the_hub():
    for path in SOURCES:
        if folder_of(path) != "publish" and name_of(path) != "callbacks/hub.py":
            assert not re.search(r"HfApi|create_commit|upload_f", path.read_text()), path


FORBIDDEN = {
    "pytorch_lightning": r"(from|import) pytorch_lightning",
    "pickle": r"^\s*(import|from) pickle",
    "unsafe load": r"torch\.load\((?![^)]*weights_only=True)",
    "remote code": r"trust_remote_code=True",
}
HARDWARE = {
    "device type": r"device\.type|\.is_cuda|torch\.cuda",
    "processor": r"(?i)avx|\bamx\b|mkldnn|onednn|cpuinfo|epyc|xeon|\bzen\b",
    "environment variable": r"os\.environ|getenv",
    "patched class": r"__class__\s*=[^=]",
    "attribute hung on a tensor": r"\b(x|tensor|weight|grad|parameter)\.(?!data\b|grad\b)\w+ = ",
}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_what_must_not_occur_does_not(rule):
    assert len(SOURCES) > 25
    found = [p for p in SOURCES if re.search(FORBIDDEN[rule], p.read_text(), re.MULTILINE)]
    assert not found


@pytest.mark.parametrize("rule", HARDWARE)
def test_hardware_is_known_in_kernels_only(rule):
    sources = {folder: [] for folder in ("kernels", "elsewhere")}
    for path in SOURCES:
        sources["kernels" if folder_of(path) == "kernels" else "elsewhere"].append(path)
    assert len(sources["elsewhere"]) > 100
    found = [p for p in sources["elsewhere"] if re.search(HARDWARE[rule], p.read_text())]
    assert not found


def test_the_lightning_release_is_pinned_past_the_bad_ones():
    assert '"lightning>=2.6.6,<2.7"' in (ROOT / "pyproject.toml").read_text()


def test_every_package_is_in_the_wheel():
    """``package-dir`` needs the packages by name, and a new folder is easily forgotten."""
    listed = re.search(r"packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), re.DOTALL)[1]
    there = {path.parent.relative_to(ROOT) for path in ROOT.glob("peagle/**/*.py")}
    wanted = {".".join(folder.parts) for folder in there}
    assert set(re.findall(r'"([^"]+)"', listed)) == wanted | {
        "peagle.callbacks",
        "peagle.configs",
        "peagle.model_cards",
    }
