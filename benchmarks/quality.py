"""Trains recipes on one store for equal steps, or equal time, and compares acceptance lengths.

    python benchmarks/quality.py --group layers --steps 700 --seeds 0 1 2
    python benchmarks/quality.py --group main --steps 700 --temperatures 0 1
    python benchmarks/quality.py --recipes default paper --minutes 4
    python benchmarks/quality.py --list

Recipes and groups are in ``recipes.yaml``. Every run is ``python -m peagle fit`` with a folder of
its own, so what is measured is what users run; fit proves its drafter by decoding the held-out
prompts. Runs that are in the results file are not repeated, and one that was interrupted goes on
from its checkpoint. A recipe with ``data`` trains on other answers to the same prompts, captured
beside the store. With ``--minutes`` a short run of each recipe tells how many steps that is,
before any of them trains. The 95 % interval is a bootstrap over prompts and seeds
(``intervals.py``).
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from intervals import PEERS, summary
from quality_results import (
    RESULTS,
    Measurement,
    format_runs,
    headline,
    key_of,
    read_rows,
    runs_of,
    save_rows,
)
from quality_runs import (
    ROOT,
    Job,
    captured_store,
    evaluation_of,
    measured,
    refuse_unrelated,
    steps_in,
)
from recipes import Recipe, check_size, choose, read_recipes, resolved, steps_per_epoch
from tqdm import tqdm

from peagle.store.reader import Store

BASE = Recipe("default", "", {})


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--recipes", nargs="+", help="names of recipes.yaml")
    what.add_argument("--group", help="a table of recipes.yaml")
    what.add_argument("--list", action="store_true", help="print groups and recipes")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--steps", type=positive, help="optimizer steps of every run")
    budget.add_argument("--minutes", type=minutes, help="or: as many as fit into this time")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    add_measuring(parser)
    parser.add_argument("--file", type=Path, default=ROOT / "benchmarks" / "recipes.yaml")
    parser.add_argument("--out", type=Path, default=ROOT / "outputs" / "quality")
    parser.add_argument("--most_epochs", type=float, default=10, help="repetitions of the store")
    args = parser.parse_args(given)
    if not args.list and args.steps is None and args.minutes is None:
        parser.error("give --steps or --minutes")
    return without_repeats(args)


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """What every training of this benchmark shares, speculators' too."""
    parser.add_argument("--k", type=positive, nargs="+", default=[5], help="drafts per round")
    parser.add_argument(
        "--temperatures", type=temperature, nargs="+", default=[0.0], help="0 is greedy"
    )
    parser.add_argument("--prompts", type=positive, help="of each prompt set; default all")
    parser.add_argument("--max_new_tokens", type=positive, default=128)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "quickstart.yaml")
    parser.add_argument("--store", type=Path, default=ROOT / "outputs" / "stores" / "quickstart")
    parser.add_argument("--results", type=Path, default=RESULTS)


def without_repeats(args: argparse.Namespace) -> argparse.Namespace:
    """What is asked twice would be decoded twice, and counted so."""
    for name in ("seeds", "k", "temperatures"):
        setattr(args, name, list(dict.fromkeys(getattr(args, name))))
    return args


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return int(text)


def minutes(text: str) -> float:
    if not 0 < float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be more than 0, got {text}")
    return float(text)


def temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return float(text)


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
    base = captured_store(args, BASE)
    measurement = Measurement(
        args.steps, args.minutes, base.manifest.identity(), evaluation_of(args)
    )
    todo = list(missing(recipes, args, measurement))
    chosen = list({recipe.name: recipe for recipe, _ in todo}.values())
    # Those of other answers come last: they may have to be captured.
    epochs = {
        recipe.name: epoch_of(recipe, settings[recipe.name], base, args)
        for recipe in sorted(chosen, key=lambda recipe: bool(recipe.data))
    }
    steps = {}
    for recipe in tqdm(chosen, desc="steps in the time") if args.minutes else chosen:
        steps[recipe.name] = args.steps or steps_in(recipe, args)
        check_size(
            recipe, epochs[recipe.name], steps=steps[recipe.name], most_epochs=args.most_epochs
        )
    bar = tqdm([Job(recipe, seed, steps[recipe.name]) for recipe, seed in todo], desc="runs")
    for job in bar:
        bar.set_postfix_str(f"{job.recipe.name}, seed {job.seed}, {job.steps} steps")
        save_rows(args.results, measured(job, args, measurement), measurement)
    report([recipe.name for recipe in recipes], args, measurement)


def epoch_of(
    recipe: Recipe, settings: dict[str, Any], base: Store, args: argparse.Namespace
) -> int:
    """Steps in which a recipe sees its own store once; raises ``ValueError`` for one too small."""
    store = base
    if recipe.data:
        store = captured_store(args, recipe)
        refuse_unrelated(base, store, recipe)
    epoch = steps_per_epoch(store, settings)
    fewest = args.steps or 1  # how many fit into equal time, a short run will tell
    check_size(recipe, epoch, steps=fewest, most_epochs=args.most_epochs)
    return epoch


def missing(
    recipes: list[Recipe], args: argparse.Namespace, measurement: Measurement
) -> Iterator[tuple[Recipe, int]]:
    """Runs that the results lack; one seed of everything before the next."""
    known = {key_of(row) for row in read_rows(args.results)}
    for seed in args.seeds:
        for recipe in recipes:
            own = {"recipe": recipe.name, "fingerprint": recipe.fingerprint(args.config),
                   "seed": seed, **measurement._asdict()}  # fmt: skip
            rows = ({**own, "k": k, "temperature": t} for k in args.k for t in args.temperatures)
            if not all(key_of(row) in known for row in rows):
                yield recipe, seed


def report(names: list[str], args: argparse.Namespace, measurement: Measurement) -> None:
    """The table of these recipes for every K, and how the default stands to its peers."""
    rows = read_rows(args.results)
    first, *others = args.temperatures
    for k in args.k:
        chosen, *beside = (
            {name: runs_of(rows, measurement, k, t)[name] for name in names}
            for t in args.temperatures
        )
        prompts = len(chosen[names[0]][0]["rounds_by_prompt"])
        print(f"\nK = {k}, temperature {first:g}, {prompts} prompts")
        reference = "default" if "default" in chosen else names[0]
        print(format_runs(chosen, reference, dict(zip(others, beside, strict=True))))
    save_rows(args.results, [], measurement)
    k, runs = headline(rows, measurement)
    for peer, ratio in ((peer, summary(runs)[f"ratio_to_{peer}"]) for peer in PEERS):
        said = "not measured" if ratio is None else f"{ratio:.3f} (K = {k}, greedy)"
        print(f"default to {peer}: {said}")
    print(f"written to {args.results}")


if __name__ == "__main__":
    main()
