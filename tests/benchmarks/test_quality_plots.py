"""The quality benchmark's plots: what was measured, and nothing that cannot be compared."""

import numpy as np
import pytest
from PIL import Image
from quality_plots import accuracy_by_depth, figures, runs_by_k
from quality_results import Measurement

from peagle.card.plots import png

MEASUREMENT = Measurement(steps=7, minutes=None, store="s", evaluation="e")


def row(recipe, k, per_round, seed=0, **changes):
    return {
        "recipe": recipe, "fingerprint": recipe, "seed": seed, "k": k, "overrides": {},
        **MEASUREMENT._asdict(), "accepted_by_prompt": [10 * per_round, 20 * per_round],
        "rounds_by_prompt": [10, 20], "accuracy": [0.5, 0.25], **changes,
    }  # fmt: skip


def bars(figure):
    """Centre and interval of every point, by the recipe's name."""
    (axes,) = figure.axes
    found = {}
    for container in axes.containers:
        points, _, (segments,) = container.lines
        intervals = [segment[:, 1].tolist() for segment in segments.get_segments()]
        found[container.get_label()] = (points.get_ydata().tolist(), intervals)
    return found


def test_every_recipe_stands_at_its_acceptance_length_with_its_interval():
    rows = [row("a", 3, 1), row("b", 3, 2), row("a", 5, 2), row("b", 5, 3), row("b", 5, 3, 1)]
    runs = runs_by_k(rows, MEASUREMENT, ["b", "a", "none"], 0.0)
    assert {k: list(chosen) for k, chosen in runs.items()} == {3: ["b", "a"], 5: ["b", "a"]}
    found = bars(figures("x", runs, 0.0)["acceptance"])
    assert list(found) == ["b", "a"]
    for name, lengths in (("a", [2.0, 3.0]), ("b", [3.0, 4.0])):
        assert found[name][0] == lengths
        assert found[name][1] == [pytest.approx([x, x]) for x in lengths]  # all prompts are alike


def test_recipes_of_one_k_have_a_line_of_their_own_by_name():
    runs = runs_by_k([row("default", 5, 1), row("b", 5, 2)], MEASUREMENT, ["default", "b"], 0.0)
    (axes,) = figures("x", runs, 0.0)["acceptance"].axes
    places = [round(place) for place in axes.get_yticks()]
    names = [label.get_text() for label in axes.get_yticklabels()]
    found = {
        names[places.index(round(container.lines[0].get_ydata()[0]))]:
            container.lines[0].get_xdata()[0]
        for container in axes.containers
    }  # fmt: skip
    assert found == {"default": 2.0, "b": 3.0}
    assert names[-1] == "default", "the first recipe stands on top"


def test_only_recipes_that_were_measured_alike_are_drawn():
    rows = [row("a", 5, 1), row("b", 5, 2, store="another"), row("c", 5, 2, temperature=1.0)]
    assert runs_by_k(rows, MEASUREMENT, ["a", "b", "c"], 0.0) == {}
    both = [*rows, row("a", 5, 1, temperature=1.0)]
    assert set(runs_by_k(both, MEASUREMENT, ["a", "b", "c"], 1.0)[5]) == {"a", "c"}
    assert figures("x", {}, 0.0) == {}


def test_accuracy_is_the_mean_over_seeds_and_that_of_other_data_is_left_out():
    rows = [row("a", 5, 1), row("a", 5, 1, 1, accuracy=[0.7, 0.35]),
            row("b", 5, 2, accuracy=[0.4, 0.4], overrides={"model.drafter": "eagle3"}),
            row("c", 5, 2, data={"greedy_share": 1.0})]  # fmt: skip
    runs = runs_by_k(rows, MEASUREMENT, ["a", "b", "c"], 0.0)
    whole, apart = figures("x", runs, 0.0)["accuracy"].axes
    lines = {line.get_label(): line.get_ydata().tolist() for line in whole.get_lines()}
    assert lines == {
        "a": pytest.approx([0.6, 0.3]), "b,\nreading true tokens": pytest.approx([0.4, 0.4])
    }  # fmt: skip
    assert [line.get_ydata().tolist() for line in apart.get_lines()] == [
        [0, 0], pytest.approx([-0.2, 0.1])
    ]  # fmt: skip
    alone = {5: {name: runs[5][name] for name in ("a", "c")}}
    assert "accuracy" not in figures("x", alone, 0.0)


def test_more_recipes_than_colours_still_look_different():
    names = [f"r{number}" for number in range(8)]
    figure = accuracy_by_depth({name: [row(name, 5, 1)] for name in names})
    looks = [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()]
    assert len(set(looks)) == len(names)


def test_plots_are_light_panels_that_any_page_can_show(tmp_path):
    rows = [row(name, k, n) for n, name in enumerate("abc") for k in (3, 5)]
    runs = runs_by_k(rows, MEASUREMENT, ["a", "b", "c"], 0.0)
    one = {5: runs[5]}
    for number, chosen in enumerate((runs, one)):
        for kind, figure in figures("x", chosen, 0.0).items():
            path = tmp_path / f"{kind}{number}.png"
            path.write_bytes(png(figure))
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGBA")).astype(int)
            assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1], 3] == 0).all(), "corners show the page"
            assert (pixels[20:-20, 20:-20, 3] == 255).all()
            assert (pixels[20:-20, 20:-20, :3].min(-1) > 235).mean() > 0.7
    assert len(list(tmp_path.glob("*.png"))) == 4
