"""What a wheel installs works from an empty folder, without the checkout."""

import os
import shutil
import subprocess
import sys

import pytest
from paths import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.short, pytest.mark.timeout(1800)]
SOURCES = ("peagle", "callbacks", "configs", "model_cards")


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder of packages that holds the wheel, and nothing of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in SOURCES:
        # Links to the other folders, as some checkouts have them, would hide what is missing.
        linked = [path.name for path in (ROOT / name).iterdir() if path.is_symlink()]
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*linked))
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", folder, source], check=True)
    (wheel,) = folder.glob("*.whl")
    subprocess.run([*pip, "install", "--no-deps", "-t", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def run(installed, tmp_path_factory):
    """``peagle`` as the wheel's script, in one folder that was empty at first."""
    empty = tmp_path_factory.mktemp("empty")

    def call(*arguments):
        ended = subprocess.run(
            [sys.executable, installed / "bin/peagle", *map(str, arguments)],
            cwd=empty,
            env={**os.environ, "PYTHONPATH": str(installed)},
            capture_output=True,
            text=True,
        )
        assert ended.returncode == 0, ended.stderr
        return ended

    call.folder = empty
    return call


def test_the_wheel_lists_copies_and_plans(run, installed):
    assert "quickstart      K 7   tiny" in run("configs").stdout
    run("configs", "copy", "eagle3")
    assert (run.folder / "eagle3.yaml").read_text() == (ROOT / "configs/eagle3.yaml").read_text()
    planned = run("plan", "--config", "quickstart", "--answers", 4, "--seconds", 0.1)
    assert f"configuration: {installed}/peagle/configs/quickstart.yaml" in planned.stderr
    assert "disk" in planned.stdout.lower()


def test_the_wheel_trains_proves_writes_a_card_and_exports(run):
    run(
        *("fit", "--config", "quickstart", "--trainer.max_steps", 2, "--model.num_layers", 1),
        *("--capture.prompts", "[{source: stdlib, split: train, limit: 12}]"),
        *("--capture.val_share", 0.3, "--capture.max_new_tokens", 16),
        *("--evaluation.prompts", "[{source: stdlib, split: test, limit: 2}]"),
        *("--evaluation.max_new_tokens", 8),
    )
    left = run.folder / "outputs/quickstart"
    assert "embedded target" in (left / "card/README.md").read_text()
    checkpoint = left / "checkpoints/last.ckpt"
    run("export", "--ckpt_path", checkpoint, "--out", "served", "--format", "speculators",
        "--target", "tiny")  # fmt: skip
    assert {path.name for path in (run.folder / "served").iterdir()} == {
        "config.json",
        "model.safetensors",
    }
