"""What a run of the quality benchmark trains on, for how long, and what is refused before."""

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from paths import ROOT
from quality import arguments, compare
from quality_results import RESULTS, read_rows
from quality_runs import (
    evaluation_of,
    refuse_unrelated,
    steps_at,
    store_folder,
)
from recipes import Recipe

from peagle.store.manifest import Manifest
from peagle.store.reader import Store

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
DEFAULT, GREEDY = Recipe("default", "", {}), Recipe("greedy", "", {}, {"greedy_share": 1.0})


def asked(*words):
    return arguments(["--recipes", "default", *words])


def test_what_is_asked_twice_is_done_once():
    args = asked("--steps", "5", "--seeds", "1", "0", "1", "--k", "5", "5", "--temperatures", "0",
                 "1", "0.0")  # fmt: skip
    assert (args.seeds, args.k, args.temperatures) == ([1, 0], [5], [0.0, 1.0])


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--steps", "0"], "argument --steps: must be at least 1, got 0"),
        (["--minutes", "0"], "argument --minutes: must be more than 0, got 0"),
        (["--minutes", "-1"], "argument --minutes: must be more than 0, got -1"),
        (["--steps", "1", "--minutes", "1"], "not allowed with argument --steps"),
        (["--steps", "1", "--k", "0"], "argument --k: must be at least 1, got 0"),
        (["--steps", "1", "--prompts", "0"], "argument --prompts: must be at least 1, got 0"),
        (["--steps", "1", "--temperatures", "-1"], "must not be negative, got -1"),
        ([], "give --steps or --minutes"),
    ],
)
def test_a_budget_or_measurement_that_makes_no_sense_is_refused(words, reason, capsys):
    with pytest.raises(SystemExit):
        asked(*words)
    assert reason in capsys.readouterr().err


def test_temperature_and_k_are_no_part_of_the_measurement_so_earlier_rows_stay_valid():
    def measurement(*words):
        return evaluation_of(asked("--steps", "5", *words))

    assert measurement() in {row["evaluation"] for row in read_rows(RESULTS)}
    assert measurement() == measurement("--temperatures", "1", "--k", "3", "7")
    assert len({measurement(), measurement("--prompts", "4"),
                measurement("--max_new_tokens", "8")}) == 3  # fmt: skip


def test_other_answers_make_another_training_from_a_store_beside():
    args = asked("--steps", "5", "--store", "stores/base")
    assert store_folder(args, DEFAULT) == Path("stores/base").resolve()
    both = replace(GREEDY, data={"greedy_share": 0.0, "temperature": 1.5})
    assert store_folder(args, both).name == "base-greedy_share-0-temperature-1.5"
    assert both.arguments() == ["--capture.greedy_share=0.0", "--capture.temperature=1.5"]
    prints = {recipe.fingerprint(QUICKSTART) for recipe in (DEFAULT, GREEDY, both)}
    assert len(prints) == 3


@pytest.fixture
def stores(random_store, tmp_path):
    """A base store, and one beside it of greedy answers to the same prompts."""
    made = {"greedy_share": 0.5, "temperature": 1.0, "prompts": {"a": "1234"}}
    other = tmp_path / "other"
    shutil.copytree(random_store, other)
    replace(Manifest.read(other), answers="other").write(other)
    for folder, share in ((random_store, 0.5), (other, 1.0)):
        record = {"made_with": {**made, "greedy_share": share}}
        (folder / "capture.json").write_text(json.dumps(record))
    return Store(random_store), other


def test_a_store_of_other_answers_to_the_same_prompts_is_comparable(stores):
    base, other = stores
    assert base.manifest.identity() != Store(other).manifest.identity()
    refuse_unrelated(base, Store(other), GREEDY)


@pytest.mark.parametrize(
    "spoil",
    [
        {"fingerprint": "another target"},
        {"layer_ids": (1, 2)},
        {"made_with": {"prompts": {"a": "5678"}}},
        {"made_with": {"temperature": 0.5}},
        {"made_with": {"greedy_share": 0.9}},
    ],
)
def test_a_store_that_differs_in_more_than_the_recipe_says_is_refused(stores, spoil):
    base, other = stores
    record = json.loads((other / "capture.json").read_text())["made_with"]
    manifest = asdict(Manifest.read(other))
    for key, value in spoil.items():
        if key == "made_with":
            record |= value
        else:
            manifest[key] = value
    (other / "capture.json").write_text(json.dumps({"made_with": record}))
    Manifest(**manifest).write(other)
    with pytest.raises(ValueError, match=r"'greedy'.* in more than greedy_share: delete it"):
        refuse_unrelated(base, Store(other), GREEDY)


def test_the_steps_that_fit_into_a_time_follow_from_a_short_run():
    assert steps_at({"hours": 0.01, "steps": 60}, minutes=3.0) == 300
    assert steps_at({"hours": 1.0, "steps": 60}, minutes=0.1) == 1
    # Hours are rounded: what took no time at all took less than 0.36 s.
    assert steps_at({"hours": 0.0, "steps": 60}, minutes=0.006) == 60


@pytest.mark.parametrize("budget", [["--minutes", "1"], ["--steps", "11"]])
def test_a_store_too_small_is_refused_before_anything_trains(random_store, tmp_path, budget):
    """20 conversations of up to 40 tokens: one step of 512 slots, and none of eight such."""
    args = asked(*budget, "--store", str(random_store), "--out", str(tmp_path / "out"),
                 "--results", str(tmp_path / "quality.json"))  # fmt: skip
    large = Recipe("large", "", {"trainer.accumulate_grad_batches": 8})
    with pytest.raises(ValueError, match=r"recipe '\w+': the store has [01] steps of data"):
        compare([large, DEFAULT], args)
    assert not (tmp_path / "out").exists() and not (tmp_path / "quality.json").exists()


def test_equal_time_that_would_repeat_the_store_too_often_is_refused_after_the_short_runs(
    random_store, tmp_path
):
    args = asked("--minutes", "1", "--store", str(random_store), "--out", str(tmp_path / "out"))
    short = tmp_path / "out" / "default" / f"{DEFAULT.fingerprint(QUICKSTART)}-pilot"
    short.mkdir(parents=True)
    record = {"training": {"hours": 0.01, "steps": 60}}
    (short / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"has 1 steps of data, and 100 steps would repeat it"):
        compare([DEFAULT], args)
    assert list((tmp_path / "out").rglob("*")) == [
        short.parent, short, short / "provenance.json"
    ]  # fmt: skip
