"""Trains recipes on one store for equal steps, or equal time, and compares acceptance lengths.

    python benchmarks/quality.py --group layers --steps 700 --seeds 0 1 2
    python benchmarks/quality.py --recipes default paper --minutes 4
    python benchmarks/quality.py --list

Recipes and groups are in ``recipes.yaml``. Every run is ``python -m peagle fit`` with a folder of
its own, so what is measured is what users run; fit proves its drafter by decoding the held-out
prompts. Runs that are in the results file are not repeated, and one that was interrupted goes on
from its checkpoint. The 95 % interval is a bootstrap over prompts and seeds (``intervals.py``).
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from intervals import PEERS
from quality_results import (
    RESULTS,
    Measurement,
    Row,
    format_runs,
    key_of,
    read_rows,
    runs_of,
    save_rows,
)
from recipes import Recipe, check_size, choose, read_recipes, resolved, steps_per_epoch
from report import machine
from tqdm import tqdm

from peagle.data.store import Store

ROOT = Path(__file__).parents[1]
PILOT = 60  # steps that tell how long a recipe's step takes


class Job(NamedTuple):
    """One training run."""

    recipe: Recipe
    seed: int
    steps: int


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipes", nargs="+", help="names of recipes.yaml")
    what.add_argument("--group", help="a table of recipes.yaml")
    what.add_argument("--list", action="store_true", help="print groups and recipes")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=int, help="optimizer steps of every run")
    budget.add_argument("--minutes", type=float, help="or: as many as fit into this time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_measuring(parser)
    parser.add_argument("--file", type=Path, default=ROOT / "benchmarks" / "recipes.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "quality")
    parser.add_argument("--most_epochs", type=float, default=10, help="repetitions of the store")
    args = parser.parse_args()
    if not args.list and args.steps is None and args.minutes is None:
        parser.error("give --steps or --minutes")
    return args


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """What every training of this benchmark shares, speculators' too."""
    parser.add_argument("--k", type=int, nargs="+", default=[5], help="drafts per round")
    parser.add_argument("--prompts", type=int, help="of each prompt set; default all")
    parser.add_argument("--max_new_tokens", type=int, default=128)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--store", type=Path, default=ROOT / "outputs" / "stores" / "quickstart")
    parser.add_argument("--results", type=Path, default=RESULTS)


def main() -> None:
    args = arguments()
    try:
        recipes, groups = read_recipes(args.file)
        if args.list:
            for name, group in groups.items():
                print(f"{name}: {group.about}\n    {' '.join(group.recipes)}")
            return
        if args.group:
            choose([args.group], groups, str(args.file))
            args.recipes = groups[args.group].recipes
        choose(args.recipes, recipes, str(args.file))
        compare([recipes[name] for name in dict.fromkeys(args.recipes)], args)
    except ValueError as error:
        raise SystemExit(f"quality: {error}") from None


def compare(recipes: list[Recipe], args: argparse.Namespace) -> None:
    """Refuse, train what is missing, and print the table."""
    settings = {recipe.name: resolved(recipe, args.config) for recipe in recipes}
    store = captured_store(args)
    epochs = {name: steps_per_epoch(store, given) for name, given in settings.items()}
    for recipe in recipes if args.steps else ():
        check_size(recipe, epochs[recipe.name], steps=args.steps, most_epochs=args.most_epochs)
    measurement = Measurement(
        args.steps, args.minutes, store.manifest.identity(), evaluation_of(args)
    )
    jobs = list(missing(recipes, args, measurement))
    bar = tqdm(jobs, desc="runs")
    for recipe, seed in bar:
        bar.set_postfix_str(f"{recipe.name}, seed {seed}")
        steps = args.steps or steps_in(recipe, args)
        check_size(recipe, epochs[recipe.name], steps=steps, most_epochs=args.most_epochs)
        rows = measured(Job(recipe, seed, steps), args, measurement)
        save_rows(args.results, rows, measurement)
    report([recipe.name for recipe in recipes], args, measurement)


def missing(
    recipes: list[Recipe], args: argparse.Namespace, measurement: Measurement
) -> Iterator[tuple[Recipe, int]]:
    """Runs that the results lack; one seed of everything before the next."""
    known = {key_of(row) for row in read_rows(args.results)}
    for seed in args.seeds:
        for recipe in recipes:
            own = {"recipe": recipe.name, "fingerprint": recipe.fingerprint(args.config),
                   "seed": seed, **measurement._asdict()}  # fmt: skip
            if not all(key_of({**own, "k": k}) in known for k in args.k):
                yield recipe, seed


def measured(job: Job, args: argparse.Namespace, measurement: Measurement) -> list[Row]:
    """Train and test one run; a row for every K."""
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
    """One row per K, over the prompts of all sets."""
    found = []
    for k in sorted({row["k"] for row in rows}):
        same = [row for row in rows if row["k"] == k]
        by_prompt = {
            key: [n for row in same for n in row[key]]
            for key in ("accepted_by_prompt", "rounds_by_prompt")
        }
        gained, rounds = map(sum, by_prompt.values())
        found.append(
            {
                "k": k,
                "prompts": sum(row["prompts"] for row in same),
                "lossless_prompts": sum(row["lossless_prompts"] for row in same),
                "acceptance_length": 1 + gained / rounds,
                **by_prompt,
            }
        )
    return found


def evaluation(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy, all held-out prompts unless limited, several at a time: speed is not measured."""
    sources = yaml.safe_load(args.config.read_text())["evaluation"]["prompts"]
    return {
        "evaluation.prompts": [{**source, "limit": args.prompts} for source in sources],
        "evaluation.k": args.k,
        "evaluation.temperatures": [0.0],
        "evaluation.max_new_tokens": args.max_new_tokens,
        "evaluation.batch_size": 16,
        "evaluation.dtype": "float32",
        "evaluation.baseline": None,
    }


def evaluation_of(args: argparse.Namespace) -> str:
    """Hash of what is decoded, whatever K."""
    settings = {key: value for key, value in evaluation(args).items() if key != "evaluation.k"}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]


def steps_in(recipe: Recipe, args: argparse.Namespace) -> int:
    """Steps that a recipe makes in ``--minutes``, by the time of a short run on this machine."""
    run_dir = args.out / recipe.name / f"{recipe.fingerprint(args.config)}-pilot"
    record = run_dir / "provenance.json"
    if not record.exists() or json.loads(record.read_text())["training"]["steps"] < PILOT:
        sources = evaluation(args)["evaluation.prompts"][:1]
        short = {"evaluation.prompts": [{**source, "limit": 1} for source in sources],
                 "evaluation.max_new_tokens": 4, "evaluation.k": [1],
                 "trainer.limit_val_batches": 1}  # fmt: skip
        fit(Job(recipe, args.seeds[0], PILOT), run_dir, short, args)
    training = json.loads(record.read_text())["training"]
    return max(1, int(args.minutes / 60 / training["hours"] * training["steps"]))


def fit(job: Job, run_dir: Path, testing: dict[str, Any], args: argparse.Namespace) -> None:
    """One fit in a process of its own; goes on from the run's checkpoint if there is one."""
    run_dir = run_dir.resolve()
    ours = {
        "run_dir": str(run_dir),
        "store": str(args.store.resolve()),
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


def captured_store(args: argparse.Namespace) -> Store:
    if not (args.store / "manifest.json").exists():
        print(f"capturing {args.store}", flush=True)
        store = str(args.store.resolve())
        run("capture", "--config", str(args.config.resolve()), "--store", store,
            log=args.out / "capture.txt")  # fmt: skip
    return Store(args.store)


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


def report(names: list[str], args: argparse.Namespace, measurement: Measurement) -> None:
    """The table of these recipes for every K, and the summary of all that was measured."""
    rows = read_rows(args.results)
    for k in args.k:
        runs = runs_of(rows, measurement, k)
        chosen = {name: runs[name] for name in names}
        print(f"\nK = {k}, greedy, {len(chosen[names[0]][0]['rounds_by_prompt'])} prompts")
        print(format_runs(chosen, "default" if "default" in chosen else names[0]))
    head = save_rows(args.results, [], measurement)
    for peer in PEERS:
        ratio = head[f"ratio_to_{peer}"]
        print(f"default to {peer}: {'not measured' if ratio is None else f'{ratio:.3f}'}")
    print(f"written to {args.results}")


if __name__ == "__main__":
    main()
