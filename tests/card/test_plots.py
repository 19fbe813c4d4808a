"""The card's plots: shown when measured, legible on any page, true to the numbers."""

import re
import shutil

import numpy as np
import pytest
from card_runs import acceptance_row, embedded_run, empty_run, folder_run, full_run, make_run
from PIL import Image

from peagle.card.card import write_card

PLOTS = {"accuracy_over_steps.png", "loss_over_steps.png", "acceptance_over_k.png",
         "acceptance_per_position.png", "throughput_over_concurrency.png"}  # fmt: skip


@pytest.mark.parametrize(
    ("run", "expected"),
    [
        (full_run, PLOTS),
        (embedded_run, {"accuracy_over_steps.png", "loss_over_steps.png"}),
        (folder_run, {"acceptance_over_k.png", "acceptance_per_position.png"}),
        (empty_run, set()),
    ],
)
def test_the_page_shows_exactly_the_plots_that_lie_beside_it(run, expected, tmp_path):
    write_card(run(tmp_path), tmp_path / "drafter", tmp_path / "card")
    page = (tmp_path / "card/README.md").read_text()
    assert {path.name for path in (tmp_path / "card").iterdir()} == expected | {"README.md"}
    shown = dict(re.findall(r"^!\[(.+)\]\((.+)\)$", page, flags=re.M))
    assert sorted(shown.values()) == sorted(expected)


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    folder = full_run(tmp_path_factory.mktemp("full"))
    write_card(folder, folder / "drafter", folder / "card")
    return folder


def test_every_plot_is_a_light_panel_with_drawing_on_it(full):
    for name in PLOTS:
        with Image.open(full / "card" / name) as image:
            assert image.format == "PNG"
            pixels = np.asarray(image.convert("RGBA")).astype(int)
        height, width, _ = pixels.shape
        assert width > 1000 and height > 400
        assert (pixels[[0, 0, -1, -1], [0, -1, 0, -1], 3] == 0).all(), "corners show the page"
        inside = pixels[20:-20, 20:-20]
        assert (inside[..., 3] == 255).all(), "nothing of the page shines through the panel"
        light = inside[..., :3].min(-1) > 235
        assert light.mean() > 0.7
        coloured = inside[..., :3].max(-1) - inside[..., :3].min(-1) > 60
        assert coloured.mean() > 0.002, f"{name} holds no series"
        assert (inside[..., :3].max(-1) < 60).mean() > 0.001, f"{name} holds no text"


def lowest_blue(folder, length):
    """The lowest pixel row of the first series in the plot over K."""
    run = make_run(folder, acceptance={"rows": [acceptance_row("a", 3, length),
                                                acceptance_row("a", 5, 4.0)]})  # fmt: skip
    write_card(run, run / "drafter", run / "card")
    with Image.open(run / "card/acceptance_over_k.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    blue = np.abs(pixels - [0, 0x72, 0xB2]).max(-1) < 12
    left = blue[:, : int(pixels.shape[1] * 0.7)]  # the legend is on the right
    return np.nonzero(left.any(1))[0].max()


def test_the_plot_follows_the_numbers(tmp_path):
    assert lowest_blue(tmp_path / "low", 1.5) > lowest_blue(tmp_path / "high", 3.5) + 100


def test_equal_files_give_equal_bytes(full, tmp_path):
    write_card(full, full / "drafter", tmp_path)
    first = {path.name: path.read_bytes() for path in (full / "card").iterdir()}
    assert len(first) == 6
    assert first == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_plot_of_an_earlier_card_does_not_stay_behind(full, tmp_path):
    card = shutil.copytree(full / "card", tmp_path / "card")
    run = embedded_run(tmp_path / "run")
    write_card(run, run / "drafter", card)
    assert {path.name for path in card.iterdir()} == {
        "README.md", "accuracy_over_steps.png", "loss_over_steps.png",
    }  # fmt: skip


def test_a_plot_takes_any_name_for_a_prompt_set(tmp_path):
    rows = [
        acceptance_row(name, 3, 2.0) for name in ("$x_1$ and $", "_hidden", "{a} \\frac", "a\nb")
    ]
    run = make_run(tmp_path, acceptance={"rows": rows}, bench={"rows": [
        row | {"concurrency": 1, "drafter": None} for row in rows
    ]})  # fmt: skip
    write_card(run, run / "drafter", run / "card")
    assert len(list((run / "card").glob("*.png"))) == 3
