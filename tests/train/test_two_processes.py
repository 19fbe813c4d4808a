"""Two processes of the real command line: capture in parts at once, then fit on two ranks."""

import json
import os
import subprocess
import sys

import pytest
from paths import ROOT

from peagle.store.index import SHARDS_PER_PROCESS, index_files
from peagle.store.reader import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
CONFIG = "configs/quickstart.yaml"
SMALL = {
    "capture.prompts": "[{source: stdlib, limit: 40}]",
    "capture.batch_size": 6,
    "capture.max_new_tokens": 16,
    "capture.val_share": 0.3,
    "data.max_tokens": 128,
    "model.num_layers": 1,
    "trainer.max_steps": 4,
    "evaluation.prompts": "[{source: stdlib, split: test, limit: 3}]",
    "evaluation.max_new_tokens": 8,
}


def start(command, folder, **more):
    options = {"run_dir": folder / "run", "store": folder / "store", **SMALL, **more}
    arguments = [f"--{key}={value}" for key, value in options.items()]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "peagle",
            command,
            "--config",
            "configs/quickstart.yaml",
            *arguments,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process):
    said, _ = process.communicate(timeout=900)
    assert process.returncode == 0, said
    return said


@pytest.mark.short
def test_two_processes_capture_at_once_and_two_ranks_train_on_what_they_made(tmp_path):
    alone = tmp_path / "alone"
    finish(start("capture", alone))
    both = [start("capture", tmp_path, **{"capture.part": part}) for part in ("0/2", "1/2")]
    said = [finish(process) for process in both]
    assert sum("is done; the others complete" in text for text in said) == 1
    parts = index_files(tmp_path / "store")
    assert {int(part.stem.partition("-")[2]) // SHARDS_PER_PROCESS for part in parts} == {0, 1}
    ours, theirs = (Store(folder / "store").entries for folder in (tmp_path, alone))
    assert len(ours) == 40
    assert [(e.sample, e.hashes) for e in ours] == [(e.sample, e.hashes) for e in theirs]

    ranks = {"trainer.devices": 2, "trainer.strategy": "ddp"}
    finish(start("fit", tmp_path, **ranks))
    run = tmp_path / "run"
    rows = json.loads((run / "metrics" / "acceptance.json").read_text())["rows"]
    assert all(row["lossless_prompts"] == row["prompts"] == 3 for row in rows)
    facts = json.loads((run / "provenance.json").read_text())
    assert facts["training"]["steps"] == 4
    assert (run / "drafter" / "model.safetensors").stat().st_size > 0
    assert (run / "card" / "README.md").stat().st_size > 0


def test_two_ranks_capture_a_missing_store_first_and_once(tmp_path):
    said = finish(start("fit", tmp_path, **{"trainer.devices": 2, "trainer.strategy": "ddp"}))
    assert said.count("capturing 40 documents") == 1
    assert len(Store(tmp_path / "store")) == 40
    assert (tmp_path / "run" / "card" / "README.md").stat().st_size > 0
