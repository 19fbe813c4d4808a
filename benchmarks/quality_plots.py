"""Draws ``results/quality.json``: a group's acceptance lengths, and its accuracy by depth.

    python benchmarks/quality_plots.py
    python benchmarks/quality_plots.py --groups main layers --steps 700 --temperature 1

Writes ``results/quality_GROUP_acceptance.png``, over K where several were measured, and
``quality_GROUP_accuracy.png``, in the look of the model card's plots. By default every group of
which at least two recipes were measured, at the steps of the summary. Accuracies are those of
``validate`` on the store's validation split, so recipes that trained on other answers have none
here, and speculators' neither.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from intervals import PEERS, compared
from matplotlib.figure import Figure
from quality_results import RESULTS, Measurement, Row, runs_of, temperature_of
from recipes import choose, read_recipes

from peagle.card.plots import INK, MARKERS, SERIES, legend, panel, png

Runs = dict[str, list[Row]]  # of each recipe, all seeds
BARS = {"capsize": 3, "ms": 5, "lw": 1.8, "elinewidth": 1.1}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--groups", nargs="+", help="tables of recipes.yaml; default all measured")
    parser.add_argument("--steps", type=int, help="default: those of the summary")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, help="folder; default that of the results")
    parser.add_argument(
        "--file", type=Path, default=Path(__file__).with_name("recipes.yaml"), help="of recipes"
    )
    return parser.parse_args()


def main() -> None:
    args = arguments()
    try:
        groups = read_recipes(args.file)[1]
        choose(args.groups or [], groups, str(args.file))
        found = json.loads(args.results.read_text())
        measurement = measured(found["summary"], args.steps)
        out = args.out or args.results.parent
        out.mkdir(parents=True, exist_ok=True)
        for name in args.groups or groups:
            recipes = [*groups[name].recipes, *(PEERS if name == "main" else ())]
            runs = runs_by_k(found["rows"], measurement, recipes, args.temperature)
            if not runs and args.groups:
                raise ValueError(f"group {name}: fewer than two of its recipes were measured")
            drawn = list(dict.fromkeys(name for chosen in runs.values() for name in chosen))
            about = groups[name].about if drawn == groups[name].recipes else ", ".join(drawn)
            for kind, figure in figures(about, runs, args.temperature).items():
                path = out / f"quality_{name}_{kind}.png"
                path.write_bytes(png(figure))
                print(f"wrote {path}")
    except ValueError as error:
        raise SystemExit(f"quality_plots: {error}") from None


def measured(summary: Mapping[str, Any], steps: int | None) -> Measurement:
    """What the summary is about, or the same with other steps."""
    about = Measurement(*(summary[name] for name in Measurement._fields))
    return about if steps is None else about._replace(steps=steps, minutes=None)


def runs_by_k(
    rows: list[Row], measurement: Measurement, recipes: list[str], temperature: float
) -> dict[int, Runs]:
    """The runs of these recipes at every K at which there are at least two of them."""
    ks = sorted({row["k"] for row in rows if temperature_of(row) == temperature})
    found = {}
    for k in ks:
        runs = runs_of(rows, measurement, k, temperature)
        chosen = {name: runs[name] for name in dict.fromkeys(recipes) if name in runs}
        if len(chosen) > 1:
            found[k] = chosen
    return found


def figures(about: str, runs: dict[int, Runs], temperature: float) -> dict[str, Figure]:
    """The plots that the runs allow, by what they show."""
    if not runs:
        return {}
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    plot = {"acceptance": acceptance_over_k(runs, how) if len(runs) > 1 else acceptance(runs, how)}
    known = {
        name: rows
        for name, rows in {**runs[min(runs)], **runs[max(runs)]}.items()
        if all(row.get("accuracy") and not row.get("data") for row in rows)
    }
    if len(known) > 1:
        plot["accuracy"] = accuracy_by_depth(known)
    for figure in plot.values():
        figure.axes[0].set_title(about, loc="left", fontsize=10, color=INK, parse_math=False)
    return plot


def look(number: int) -> dict[str, str]:
    """Of a recipe's line; after six the colours come again, dashed."""
    again = number >= len(SERIES)
    return {
        "color": SERIES[number % len(SERIES)],
        "marker": MARKERS[number % len(MARKERS)],
        "ls": "--" if again else "-",
    }


def acceptance_over_k(runs: dict[int, Runs], how: str) -> Figure:
    """A line per recipe; those of one K stand a little apart, so that intervals can be read."""
    figure, (axes,) = panel(f"Acceptance length over K, {how}, with 95% intervals")
    names = list(dict.fromkeys(name for chosen in runs.values() for name in chosen))
    lines = {k: {x["recipe"]: x for x in compared(chosen, "")} for k, chosen in runs.items()}
    step = 0.6 / len(names)
    for number, name in enumerate(names):
        points = [(k, found[name]) for k, found in lines.items() if name in found]
        offset = (number - (len(names) - 1) / 2) * step
        lengths = [line["acceptance_length"] for _, line in points]
        axes.errorbar(
            [k + offset for k, _ in points],
            lengths,
            spread([line for _, line in points]),
            label=name,
            **look(number),
            **BARS,
        )
    axes.set(xlabel="K, draft tokens per round", ylabel="tokens per verification")
    axes.set_xticks(list(runs))
    legend(figure, axes)
    return figure


def acceptance(runs: dict[int, Runs], how: str) -> Figure:
    """Of one K, a line of its own per recipe, by name."""
    ((k, chosen),) = runs.items()
    figure, (axes,) = panel(f"Acceptance length at K = {k}, {how}, with 95% intervals")
    lines = compared(chosen, "")[::-1]  # the first on top
    for place, line in enumerate(lines):
        style = look(0 if line["recipe"] == "default" else 1) | {"marker": "o", "ls": ""}
        axes.errorbar(line["acceptance_length"], place, xerr=spread([line]), **style, **BARS)
    axes.set_yticks(range(len(lines)), [line["recipe"] for line in lines])
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.grid(axis="x", color=axes.yaxis.get_gridlines()[0].get_color(), lw=0.8)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("tokens per verification")
    return figure


def spread(lines: list[dict[str, Any]]) -> list[list[float]]:
    """How far each interval reaches below and above."""
    return [
        [abs(line["acceptance_length"] - line["ci95"][side]) for line in lines] for side in (0, 1)
    ]


def accuracy_by_depth(runs: Runs) -> Figure:
    """Teacher-forced accuracy on validation data, mean over seeds; and how far it lies from the
    first recipe's, since most lie close together.

    An autoregressive drafter's deeper rows read the true tokens in place of its own guesses, so
    that its line lies too high beside the others.
    """
    figure, (whole, apart) = panel("Accuracy of each depth on validation data, mean over seeds", 2)
    means = {name: mean_accuracy(rows) for name, rows in runs.items()}
    first = next(iter(means))
    for number, (name, own) in enumerate(means.items()):
        reads = runs[name][0]["overrides"].get("model.drafter") == "eagle3"
        label = f"{name},\nreading true tokens" if reads else name
        style = {"ms": 4, "lw": 1.8, "label": label, **look(number)}
        whole.plot(range(len(own)), own, **style)
        difference = [x - y for x, y in zip(own, means[first], strict=False)]
        apart.plot(range(len(difference)), difference, **style)
    whole.set(ylabel="top-1 accuracy", ylim=(0, None))
    apart.set_ylabel(f"above {first}'s")
    for axes in (whole, apart):
        axes.set_xlabel("depth")
        axes.xaxis.get_major_locator().set_params(integer=True)
    legend(figure, whole, apart)
    return figure


def mean_accuracy(rows: list[Row]) -> list[float]:
    return [
        sum(seeds) / len(seeds) for seeds in zip(*(row["accuracy"] for row in rows), strict=True)
    ]


if __name__ == "__main__":
    main()
