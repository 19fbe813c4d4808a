"""What publishing costs a training step, whatever the Hub does.

    PYTHONPATH=tests python benchmarks/publishing.py

The quickstart's fit, shortened, without a publisher (twice, which shows the noise), and with one
that publishes every checkpoint to the loopback Hub of the tests: which works, hangs, or answers 503
to everything. All fits take the same steps on the same batches and must end with the same weights,
so that steps are compared one by one: the time of a step is its median over the rounds, and
``cpu_step`` and ``wall_step`` are the medians over all steps of its ratio to the same step without
a publisher. ``cpu_all`` and ``wall_all`` are the ratios of the sums, saves included. ``save`` is
what one publication costs the training thread; ``save_share`` sets it against the steps between
two saves of the quickstart. Both are shares of 1.
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
Times = dict[str, list[float]]


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
        path = run_dir.with_name(f"{run_dir.name}.yaml")
        path.write_text(
            json.dumps(configuration(run_dir, hub if FAULTS[name] is not None else None, args))
        )
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
        if FAULTS[name] is not None and not hub.requests:
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
    *others, publisher = trainer["callbacks"]
    for callback in others:
        if callback["class_path"] == "callbacks.checkpoint.Checkpoint":
            callback["init_args"]["every_n_steps"] = args.save_every
    if hub is not None:
        publisher["init_args"] = {
            "repo_id": REPO, "endpoint": hub.url, "hub_strategy": "every_save",
            "always_push": True, "publish_timeout": 20.0,
        }  # fmt: skip
    trainer["callbacks"] = [{"class_path": "step_times.StepTimes"}, *others, publisher]
    return config


def compared(name: str, times: dict[str, list[Times]], save_every: int) -> dict[str, Any]:
    cpu, wall = (typical(times[name], clock) for clock in ("cpu", "wall"))
    cpu_alone, wall_alone = (typical(times[ALONE], clock) for clock in ("cpu", "wall"))
    # The time of a step that ends with a save: it reaches to the begin of the next one.
    extra = [cpu[step] - cpu_alone[step] for step in range(save_every - 1, len(cpu), save_every)]
    every = yaml.safe_load(QUICKSTART.read_text())["trainer"]["callbacks"]
    (cadence,) = (c["init_args"]["every_n_steps"] for c in every if "Checkpoint" in c["class_path"])
    step = statistics.median(cpu_alone[WARM_UP:])
    return {
        "hub": name,
        "milliseconds": 1e3 * statistics.median(cpu[WARM_UP:]),
        "cpu_step": ratio(cpu, cpu_alone),
        "wall_step": ratio(wall, wall_alone),
        "cpu_all": sum(cpu[WARM_UP:]) / sum(cpu_alone[WARM_UP:]),
        "wall_all": sum(wall[WARM_UP:]) / sum(wall_alone[WARM_UP:]),
        "save_milliseconds": 1e3 * statistics.mean(extra),
        "save_share": statistics.mean(extra) / (cadence * step),
    }


def typical(runs: list[Times], clock: str) -> list[float]:
    """Each step's median over the rounds."""
    return [statistics.median(times) for times in zip(*(run[clock] for run in runs), strict=True)]


def ratio(times: list[float], alone: list[float]) -> float:
    pairs = zip(times[WARM_UP:], alone[WARM_UP:], strict=True)
    return statistics.median(time / other for time, other in pairs)


if __name__ == "__main__":
    main()
