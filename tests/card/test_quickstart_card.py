"""The card that the repository ships is the one that the files beside it give (``make card``)."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from card_runs import full_run, outline, section, tables_in
from huggingface_hub import ModelCard
from paths import ROOT
from PIL import Image

from peagle.card.card import render
from peagle.card.run_files import RunFiles, Section

PAGE = ROOT / "model_cards/quickstart"


@pytest.fixture(scope="module")
def page() -> str:
    return (PAGE / "README.md").read_text()


def rows_of(page: str) -> list[dict[str, str]]:
    return [row for table in tables_in(page) for row in table]


def test_the_shipped_card_is_what_its_files_give(page):
    """But for two facts of the weights, which are not shipped."""
    run_files = RunFiles.read(PAGE, PAGE)
    assert not {"weights_sha256", "parameters"} & run_files.drafter.keys()
    again = render(run_files)
    assert outline(again) == outline(page)
    changed = [row for row in rows_of(again) if row not in rows_of(page)]
    assert [row["Fact"] for row in changed] == ["Drafter weights, sha256"]
    drafter = Section(run_files.drafter, weights_sha256="0" * 64, parameters=1)
    again = render(dataclasses.replace(run_files, drafter=drafter))
    assert len(again.splitlines()) == len(page.splitlines())


def test_the_shipped_card_is_of_a_run_of_the_quickstart_that_was_decoded(page):
    data = ModelCard(page).data
    lengths = [result.metric_value for result in data.eval_results]
    measured = json.loads((PAGE / "metrics/acceptance.json").read_text())["rows"]
    assert lengths == [row["acceptance_length"] for row in measured] and lengths
    assert "peagle fit --config quickstart" in page and "the embedded target" in page
    assert "not measured" not in section(page, "Measured acceptance")
    assert "not measured" not in section(page, "Teacher-forced per-depth accuracy")
    assert re.search(r"\| Drafter weights, sha256 \| `[0-9a-f]{64}` \|", page)


def test_every_plot_of_the_shipped_card_lies_beside_it(page):
    shown = re.findall(r"^!\[.+\]\((.+)\)$", page, flags=re.M)
    assert {"acceptance_over_k.png", "accuracy_over_steps.png"} <= set(shown)
    assert set(shown) == {path.name for path in PAGE.glob("*.png")}
    for name in shown:
        with Image.open(PAGE / name) as image:
            image.verify()


def test_nothing_of_the_machine_that_trained_it_is_on_the_shipped_card():
    for path in PAGE.rglob("*"):
        if path.is_file() and path.suffix != ".png":
            assert not re.search(r"(?<![\w.:/])/(home|root|work|tmp|Users)/", path.read_text()), (
                path
            )


def make_card(run: Path, out: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "peagle.card.card", run, run / "drafter", out]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_command_writes_the_card_with_the_files_of_its_figures(tmp_path):
    run = full_run(tmp_path / "run")
    (tmp_path / "page/metrics").mkdir(parents=True)
    (tmp_path / "page/metrics/train.csv").write_text("of an earlier card")
    (run / "metrics/train.csv").unlink()
    assert make_card(run, tmp_path / "page").returncode == 0
    written = {p.relative_to(tmp_path / "page").as_posix() for p in tmp_path.rglob("page/**/*.*")}
    assert written == {
        "README.md", "provenance.json", "config.json", "metrics/validate.json",
        "metrics/acceptance.json", "metrics/bench.json", "acceptance_over_k.png",
        "acceptance_per_position.png", "throughput_over_concurrency.png",
    }  # fmt: skip
    (tmp_path / "README.md").write_text("# My project")
    foreign = make_card(run, tmp_path)
    assert foreign.returncode == 1 and "is no card of peagle" in foreign.stderr
    assert (tmp_path / "README.md").read_text() == "# My project"
    nothing = make_card(tmp_path / "nowhere", tmp_path / "page")
    assert nothing.returncode == 1 and "holds no run: train it first" in nothing.stderr
