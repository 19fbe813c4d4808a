"""Every shipped configuration parses, is complete, and says how to run it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_parses_and_prints_itself(path):
    result = subprocess.run(
        [sys.executable, "-m", "peagle", "fit", "--config", str(path), "--print_config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    printed, written = yaml.safe_load(result.stdout), yaml.safe_load(path.read_text())
    for key in ("target", "run_dir", "store"):
        assert printed[key] == written[key]
    assert printed["model"]["cod"] == {"min_keep_ratio": 0.0, **written["model"]["cod"]}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_starts_with_command_and_hardware(path):
    head = path.read_text().split("\n\n")[0]
    assert f"# python -m peagle fit --config configs/{path.name}" in head
    assert "Hardware:" in head and "Expected:" in head


def test_there_is_a_configuration_to_test():
    assert "quickstart" in {path.stem for path in CONFIGS}
