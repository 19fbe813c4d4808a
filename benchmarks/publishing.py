"""What publishing costs a training step, whatever the Hub does.

    PYTHONPATH=tests/helpers python benchmarks/publishing.py

The quickstart's fit, shortened, without a publisher (twice, which shows the noise), and with one
that publishes every checkpoint to the loopback Hub of the tests: which works, hangs, or answers 503
to everything. All fits take the same steps on the same batches and must end with the same weights,
so that steps are compared one by one; a step's time is its median over the rounds. Percentages are
what a step takes more than the same step without a publisher: ``cpu`` and ``wall`` the median over
the steps, ``cpu_sum`` and ``wall_sum`` of all steps together, those after a save included.
``save_milliseconds`` is what one publication costs the training thread when a checkpoint is saved,
``save`` its share of the steps between two saves of the quickstart. ``hooks`` is the same share of
what the publisher's own hooks took, which is measured within each fit: no noise between fits.
"""

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from hub_server import TOKEN, Hub
from report import machine, save, table

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "configs/quickstart.yaml"
REPO = "alice/drafter"
ALONE, AGAIN = "no publisher", "no publisher again"
FAULTS = {
    ALONE: None,
    AGAIN: None,
    "works": {},
    "hangs": {"hang": 3600.0},
    "answers 503": {"status": 503},
}
WARM_UP = 5  # steps that are not counted
Times = dict[str, Any]  # of the steps by clock, and of the publisher's hooks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=60, help="of each fit")
    parser.add_argument("--save_every", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=3, help="fits of each kind, taken in turn")
    args = parser.parse_args()
    facts = {**vars(args), "machine": machine()}
    times: dict[str, list[Times]] = {name: [] for name in FAULTS}
    weights = set()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(args.rounds):
            for name in FAULTS:
                run_dir = Path(folder) / f"{number}-{name.replace(' ', '-')}"
                times[name].append(fit(run_dir, name, args))
                drafter = run_dir / "drafter/model.safetensors"
                weights.add(hashlib.sha256(drafter.read_bytes()).hexdigest())
                print(f"round {number + 1}, {name}: done", flush=True)
    if len(weights) != 1:
        raise SystemExit("the fits ended with different weights: their steps cannot be compared")
    rows = [compared(name, times, args.save_every) for name in FAULTS]
    print(table(rows))
    print(f"written to {save('publishing', rows, keys=('hub',), **facts)}")


def fit(run_dir: Path, name: str, args: argparse.Namespace) -> Times:
    """One fit of the command line, in a process of its own, beside a Hub of its own."""
    with Hub() as hub:
        if FAULTS[name]:
            hub.fault("any", **FAULTS[name])
        published = hub if FAULTS[name] is not None else None
        path = run_dir.with_name(f"{run_dir.name}.yaml")
        path.write_text(json.dumps(configuration(run_dir, published, args)))
        environment = {
            "HF_TOKEN": TOKEN, "HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "peagle", "fit", "--config", str(path)],
            cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
        )  # fmt: skip
        if done.returncode:
            raise SystemExit(f"{name}: the fit failed:\n{done.stderr[-3000:]}")
        if published and not hub.requests:
            raise SystemExit(f"{name}: nothing was published:\n{done.stderr[-3000:]}")
    return json.loads((run_dir / "step_times.json").read_text())


def configuration(run_dir: Path, hub: Hub | None, args: argparse.Namespace) -> dict[str, Any]:
    """The quickstart's, with few prompts, few steps and almost no evaluation."""
    config = yaml.safe_load(QUICKSTART.read_text())
    config |= {"run_dir": str(run_dir), "store": str(run_dir.parent / "store")}
    config["capture"]["prompts"][0]["limit"] = 160
    config["evaluation"] |= {"k": [2], "max_new_tokens": 4}
    config["evaluation"]["prompts"][0]["limit"] = 1
    trainer = config["trainer"]
    trainer |= {"max_epochs": -1, "max_steps": args.steps, "check_val_every_n_epoch": args.steps}
    trainer["profiler"] = "simple"
    *others, publisher = trainer["callbacks"]
    for callback in others:
        if is_checkpoint(callback):
            callback["init_args"]["every_n_steps"] = args.save_every
    if hub is not None:
        publisher["init_args"] = {
            "repo_id": REPO, "endpoint": hub.url, "hub_strategy": "every_save",
            "always_push": True, "publish_timeout": 20.0,
        }  # fmt: skip
    trainer["callbacks"] = [{"class_path": "step_times.StepTimes"}, *others, publisher]
    return config


def compared(name: str, times: dict[str, list[Times]], save_every: int) -> dict[str, Any]:
    typical = {
        (kind, clock): [
            statistics.median(step) for step in zip(*(run[clock] for run in runs), strict=True)
        ]
        for kind, runs in times.items()
        for clock in ("cpu", "wall")
    }
    count = len(typical[ALONE, "cpu"])
    saves = range(save_every - 1, count, save_every)  # these reach to the begin of the next step
    steps = [step for step in range(WARM_UP, count) if step not in saves]
    row: dict[str, Any] = {"hub": name}
    for clock in ("cpu", "wall"):
        ours, alone = ([typical[kind, clock][i] for i in steps] for kind in (name, ALONE))
        ratios = [time / other for time, other in zip(ours, alone, strict=True)]
        row |= {
            f"{clock}_milliseconds": 1e3 * statistics.median(ours),
            f"{clock}_percent": 100 * (statistics.median(ratios) - 1),
            f"{clock}_sum_percent": 100 * (sum(ours) / sum(alone) - 1),
        }
    cost = statistics.mean(typical[name, "cpu"][i] - typical[ALONE, "cpu"][i] for i in saves)
    between = cadence() * statistics.median(typical[ALONE, "cpu"][i] for i in steps)
    hooks = statistics.median(
        run["publisher"] / len(saves) / cadence() / statistics.median(run["wall"])
        for run in times[name]
    )
    return row | {
        "save_milliseconds": 1e3 * cost,
        "save_percent": 100 * cost / between,
        "hooks_percent": 100 * hooks,
    }


def cadence() -> int:
    """The steps between two checkpoints of the quickstart."""
    callbacks = yaml.safe_load(QUICKSTART.read_text())["trainer"]["callbacks"]
    (every,) = (c["init_args"]["every_n_steps"] for c in callbacks if is_checkpoint(c))
    return every


def is_checkpoint(callback: dict[str, Any]) -> bool:
    return callback["class_path"] == "peagle.callbacks.checkpoint.Checkpoint"


if __name__ == "__main__":
    main()
