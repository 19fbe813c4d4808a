"""One run of ``quality.py``: its store, its ``fit``, and the figures that fit wrote down."""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from quality_results import Measurement, Row
from recipes import Recipe
from report import machine

from peagle.store.reader import Store

ROOT = Path(__file__).parents[1]
PILOT = 60  # steps that tell how long a recipe's step takes
GREEDY = [0.0]


class Job(NamedTuple):
    """One training run."""

    recipe: Recipe
    seed: int
    steps: int


def captured_store(args: argparse.Namespace, recipe: Recipe) -> Store:
    """The store that a recipe trains on: ``--store``, or one beside it for other answers."""
    folder = store_folder(args, recipe)
    if not (folder / "manifest.json").exists():
        print(f"capturing {folder}", flush=True)
        run("capture", "--config", str(args.config.resolve()), "--store", str(folder),
            *recipe.capture_arguments(), log=args.out / "capture.txt")  # fmt: skip
    return Store(folder)


def store_folder(args: argparse.Namespace, recipe: Recipe) -> Path:
    base = args.store.resolve()
    return base.with_name("-".join([base.name, *(f"{k}-{v:g}" for k, v in recipe.data.items())]))


def refuse_unrelated(base: Store, store: Store, recipe: Recipe) -> None:
    """Raise ``ValueError`` unless two stores differ in what the recipe says, and in nothing else.

    Same target, same prompts: then runs on both may stand in one table.
    """
    wanted, found = (made_with(s.folder / "capture.json") for s in (base, store))
    same_target = replace(store.manifest, answers=base.manifest.answers) == base.manifest
    if not same_target or found != {**wanted, **recipe.data}:
        raise ValueError(
            f"recipe {recipe.name!r}: {store.folder} differs from {base.folder} in more than "
            f"{', '.join(recipe.data)}: delete it, and it is captured again"
        )


def made_with(record: Path) -> dict[str, Any]:
    return json.loads(record.read_text()).get("made_with", {}) if record.exists() else {}


def measured(job: Job, args: argparse.Namespace, measurement: Measurement) -> list[Row]:
    """Train and test one run; a row for every K and temperature."""
    fingerprint = job.recipe.fingerprint(args.config)
    run_dir = args.out / job.recipe.name / f"{fingerprint}-steps{job.steps}-seed{job.seed}"
    fit(job, run_dir, evaluation(args), args)
    shared = {
        "recipe": job.recipe.name,
        "fingerprint": fingerprint,
        "seed": job.seed,
        **measurement._asdict(),
        "steps_done": job.steps,
        "overrides": job.recipe.overrides,
        "machine": machine(),
    }
    if job.recipe.data:  # the measurement names the base store, which these answers are not from
        trained_on = Store(store_folder(args, job.recipe)).manifest.identity()
        shared |= {"data": job.recipe.data, "trained_on": trained_on}
    return [{**shared, **row} for row in figures(run_dir)]


def figures(run_dir: Path) -> list[Row]:
    """What fit wrote down, prompt sets taken together."""
    acceptance, validate = (
        json.loads((run_dir / "metrics" / f"{name}.json").read_text())
        for name in ("acceptance", "validate")
    )
    training = json.loads((run_dir / "provenance.json").read_text())["training"]
    found = pooled(acceptance["rows"])
    for row in found:
        row |= {
            "loss": validate["loss"],
            "accuracy": [line["accuracy"] for line in validate["rows"]],
            "teacher_forced_acceptance_length": validate["teacher_forced_acceptance_length"],
            "training_hours": training["hours"],
            "tokens": training["tokens"],
        }
    return found


def pooled(rows: list[Row]) -> list[Row]:
    """One row per K and temperature, over the prompts of all sets."""
    found = []
    for k, temperature in sorted({(row["k"], row["temperature"]) for row in rows}):
        same = [row for row in rows if (row["k"], row["temperature"]) == (k, temperature)]
        by_prompt = {
            key: [n for row in same for n in row[key]]
            for key in ("accepted_by_prompt", "rounds_by_prompt")
        }
        gained, rounds = map(sum, by_prompt.values())
        equal = [row["lossless_prompts"] for row in same]
        found.append(
            {
                "k": k,
                "temperature": temperature,
                "prompts": sum(row["prompts"] for row in same),
                "lossless_prompts": None if None in equal else sum(equal),  # sampled: not known
                "acceptance_length": 1 + gained / rounds,
                **by_prompt,
            }
        )
    return found


def evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """All held-out prompts unless limited, several at a time: speed is not measured."""
    sources = yaml.safe_load(args.config.read_text())["evaluation"]["prompts"]
    return {
        "evaluation.prompts": [{**source, "limit": args.prompts} for source in sources],
        "evaluation.k": args.k,
        "evaluation.temperatures": args.temperatures,
        "evaluation.max_new_tokens": args.max_new_tokens,
        "evaluation.batch_size": 16,
        "evaluation.dtype": "float32",
        "evaluation.baseline": None,
    }


def evaluation_of(args: argparse.Namespace) -> str:
    """Hash of what is decoded, whatever K and temperature, which every row has of its own.

    Temperatures stand in it as if they were greedy alone, as they were in the first results; a
    drafter that is shown beside ours does not, since it changes nothing about ours.
    """
    settings = {**evaluation(args), "evaluation.temperatures": GREEDY}
    for key in ("evaluation.k", "evaluation.baseline"):
        del settings[key]
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def steps_in(recipe: Recipe, args: argparse.Namespace) -> int:
    """Steps that a recipe makes in ``--minutes``, by the time of a short run on this machine."""
    run_dir = args.out / recipe.name / f"{recipe.fingerprint(args.config)}-pilot"
    record = run_dir / "provenance.json"
    if not record.exists() or json.loads(record.read_text())["training"]["steps"] < PILOT:
        sources = evaluation(args)["evaluation.prompts"][:1]
        short = {"evaluation.prompts": [{**source, "limit": 1} for source in sources],
                 "evaluation.max_new_tokens": 4, "evaluation.k": [1],
                 "evaluation.temperatures": GREEDY, "trainer.limit_val_batches": 1}  # fmt: skip
        fit(Job(recipe, args.seeds[0], PILOT), run_dir, short, args)
    return steps_at(json.loads(record.read_text())["training"], args.minutes)


def steps_at(training: dict[str, Any], minutes: float) -> int:
    """``training`` is a run's record, whose hours are rounded to 0.0001."""
    return max(1, round(minutes / 60 / max(training["hours"], 1e-4) * training["steps"]))


def fit(job: Job, run_dir: Path, testing: dict[str, Any], args: argparse.Namespace) -> None:
    """One fit in a process of its own; goes on from the run's checkpoint if there is one."""
    run_dir = run_dir.resolve()
    ours = {
        "run_dir": str(run_dir),
        "store": str(store_folder(args, job.recipe)),
        "seed_everything": job.seed,
        "data.seed": job.seed,
        "trainer.max_steps": job.steps,
        "trainer.max_epochs": -1,
        "trainer.check_val_every_n_epoch": 10**6,  # only at the end: equal time is for training
        **testing,
    }
    options = Recipe("", "", ours).arguments() + job.recipe.arguments()
    run("fit", "--config", str(args.config.resolve()), "--ckpt_path", "last", *options,
        log=run_dir / "log.txt")  # fmt: skip


def run(*command: str, log: Path) -> None:
    """``python -m peagle``; interrupted together with us, it ends in order first."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "peagle", *command],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait()
        except KeyboardInterrupt:
            process.wait()
            raise
    if code:
        tail = "\n".join(log.read_text().splitlines()[-15:])
        raise SystemExit(f"peagle {command[0]} ended with {code}, {log} ends with:\n{tail}")
