"""What ``import peagle`` offers, and what it costs."""

import json
import os
import re
import subprocess
import sys

import pytest
from paths import ROOT

import peagle

PAGE = ROOT / "docs" / "python.md"


def python(*arguments, folder=ROOT, timeout=200):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    result = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_quick_and_loads_nothing_heavy():
    code = (
        "import json, sys, time; begin = time.perf_counter(); import peagle; "
        "print(json.dumps([time.perf_counter() - begin, sorted(sys.modules)]))"
    )
    seconds, modules = json.loads(python("-c", code))
    assert "peagle" in modules
    assert not {"torch", "lightning", "transformers", "numpy", "datasets"} & set(modules)
    assert seconds < 1  # usually a few milliseconds


@pytest.mark.parametrize("name", peagle.PUBLIC)
def test_a_public_name_is_there_and_documented(name):
    assert getattr(peagle, name).__doc__
    assert f"`{name}`" in PAGE.read_text()
    assert name in peagle.__all__ and name in dir(peagle)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'peagle' has no attribute 'Pegale'"):
        _ = peagle.Pegale


def test_the_version_is_that_of_the_changelog():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1]
    assert python("-m", "peagle", "--version") == f"peagle {newest}\n"


def test_the_script_of_the_page_trains_decodes_and_exports(tmp_path):
    (script,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(script.splitlines()) < 45
    (tmp_path / "script.py").write_text(script)
    out = python("script.py", folder=tmp_path)
    accepted = json.loads(re.search(r"\[[\d, ]+\]\s*$", out)[0])
    assert accepted and max(accepted) <= 5
    written = {path.name for path in (tmp_path / "outputs/script/drafter").iterdir()}
    assert written == {"config.json", "model.safetensors"}
