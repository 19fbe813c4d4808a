"""Whole runs of the command line that publish: capture, fit, validate, test, export, card, Hub."""

import csv
import json
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from paths import ROOT

STEPS = 4
SMALL = {
    "trainer": {"max_steps": STEPS, "log_every_n_steps": 1, "precision": "32-true"},
    "capture": {
        "prompts": [{"source": "stdlib", "split": "train", "limit": 24}],
        "max_new_tokens": 12, "max_tokens": 160, "val_share": 0.3,
    },
    "model": {"num_layers": 1, "cod": {"num_depths": 3}},
    "data": {"max_tokens": 200, "max_rows": 400},
    "evaluation": {
        "prompts": [{"source": "stdlib", "split": "test", "limit": 1}],
        "k": [2], "max_new_tokens": 4,
    },
}  # fmt: skip

# Importing takes seconds, so it is done once, in a process from which the runs are forked.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["peagle.cli", "peagle.callbacks.hub", "peagle.callbacks.evaluate"])


def write_config(run_dir: Path, store: Path, every_n_steps: int = 2, **publisher: Any) -> Path:
    """The quickstart's configuration in small, its last callback publishing as told."""
    config = yaml.safe_load((ROOT / "configs/quickstart.yaml").read_text())
    for section, values in SMALL.items():
        config[section] = merged(config[section], values)
    config |= {"run_dir": str(run_dir), "store": str(store)}
    *others, hub = config["trainer"]["callbacks"]
    assert hub["class_path"] == "peagle.callbacks.hub.HubPublisher"
    for callback in others:
        if callback["class_path"] == "peagle.callbacks.checkpoint.Checkpoint":
            callback["init_args"]["every_n_steps"] = every_n_steps
    hub["init_args"] = publisher
    path = run_dir.with_name(f"{run_dir.name}.yaml")
    path.write_text(json.dumps(config))
    return path


def merged(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return config | {
        key: merged(config[key], value) if isinstance(config.get(key), dict) else value
        for key, value in changes.items()
    }


def peagle(*arguments: Any, **environment: str) -> subprocess.CompletedProcess:
    """``python -m peagle`` as a user starts it."""
    return subprocess.run(
        [sys.executable, "-m", "peagle", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )


def forked(*arguments: Any, log: Path, **environment: str) -> multiprocessing.Process:
    """The same in a process that has everything imported already; its output goes to ``log``."""
    os.environ["PYTHONPATH"] = f"{ROOT}{os.pathsep}{Path(__file__).parent}"  # for the fork server
    process = _forks.Process(
        target=_as_process, args=([*map(str, arguments)], environment, str(log))
    )
    process.start()
    return process


def _as_process(arguments: list[str], environment: dict[str, str], log: str) -> None:
    import torch

    from peagle.__main__ import main

    multiprocessing.set_start_method("fork", force=True)
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = ["peagle", *arguments]
    torch.set_num_threads(1)
    main()


def losses(run_dir: Path) -> list[str]:
    """The loss of every step, as it was written."""
    with (run_dir / "metrics/train.csv").open(newline="") as file:
        return [row["train/loss"] for row in csv.DictReader(file) if row["train/loss"]]
