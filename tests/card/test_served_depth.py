"""The K of the card's serving lines: measured where it was measured, and said where it is from."""

import json
import shlex

import pytest
from card_runs import ACCEPTANCE, DRAFTER, PROVENANCE, acceptance_row, bench_row, block, make_run

from peagle.card.card import render
from peagle.card.run_files import RunFiles
from peagle.card.served_depth import served_depth


def run_of(folder, **files):
    run = make_run(folder, provenance=PROVENANCE, drafter=DRAFTER, **files)
    return RunFiles.read(run, run / "drafter")


def benched(*speeds, method="p-eagle"):
    """Rows of ``bench.json`` from (K, requests at once, speed-up)."""
    none = [bench_row(at_once, None, 500) for at_once in (1, 8)]
    return none + [
        bench_row(at_once, "/run/drafter", 900, k=k, speedup=speedup, method=method)
        for k, at_once, speedup in speeds
    ]


def test_the_fastest_of_the_bench_is_served_whatever_accepts_most(tmp_path):
    # K = 5 wins alone, K = 3 wins on the whole.
    rows = benched((3, 1, 1.6), (3, 8, 1.5), (5, 1, 1.7), (5, 8, 1.1))
    other = benched((9, 1, 5.0), (9, 8, 5.0), method="eagle3")[2:]
    run = run_of(tmp_path, acceptance=ACCEPTANCE, bench={"rows": rows + other})
    assert served_depth(run) == (3, "K = 3 was the fastest in `peagle bench`.")
    page = render(run)
    setting = json.loads(shlex.split(block(page, "bash", "vllm serve"))[5])
    assert setting["num_speculative_tokens"] == 3
    assert "'num_speculative_tokens': 3," in block(page, "python", "SM_VLLM")
    assert "verification at K = 3," in page and "K = 3 was the fastest" in page


def test_a_bench_in_which_no_drafter_is_faster_is_not_called_a_gain(tmp_path):
    rows = benched((2, 1, 1.12), (2, 8, 0.84), (4, 1, 0.53), (4, 8, 0.62))
    run = run_of(tmp_path, acceptance=ACCEPTANCE, bench={"rows": rows})
    assert served_depth(run) == (
        2,
        "No K was faster than no drafter in `peagle bench`: K = 2 lost least, with 0.98 of the "
        "tokens per second on average.",
    )


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ({3: 2.47, 5: 2.58, 7: 2.58}, 5),
        ({1: 1.69, 3: 1.70, 7: 1.70}, 1),
        ({3: 2.00, 5: 2.04, 7: 2.05}, 5),  # 2.00 is 2.4 % short
        ({7: 3.0}, 7),
    ],
)
def test_without_a_bench_the_smallest_depth_that_accepts_about_as_much_is_served(
    tmp_path, lengths, expected
):
    rows = [acceptance_row("code", k, length) for k, length in lengths.items()]
    rows.append(acceptance_row("code", 9, 9.0, temperature=0.7))  # under other conditions
    served = served_depth(run_of(tmp_path, acceptance={"rows": rows}))
    assert served.k == expected and "within 2 %" in served.reason


def test_every_prompt_set_counts_alike(tmp_path):
    rows = [
        acceptance_row(name, k, length)
        for name, k, length in (("a", 3, 2.0), ("a", 5, 2.0), ("b", 3, 3.0), ("b", 5, 4.0))
    ]
    rows.append(acceptance_row("c", 7, 9.0))  # at this K nothing else was measured
    assert served_depth(run_of(tmp_path, acceptance={"rows": rows})).k == 3  # the first set's alone
    assert served_depth(run_of(tmp_path, acceptance={"rows": rows[:4]})).k == 5


def test_without_figures_the_trained_depth_is_served_and_the_page_says_so(tmp_path):
    run = run_of(tmp_path)
    assert served_depth(run).k == PROVENANCE["training"]["num_depths"]
    assert "K = 5 is the trained depth; `peagle bench` finds the fastest" in render(run)
