"""The harness of the quality benchmark: recipes, refusals, intervals, summary; nothing trains."""

import json

import pytest
import torch
from intervals import compared, draw, interval, mean_length, summary
from paths import ROOT
from quality_results import (
    Measurement,
    format_runs,
    headline,
    key_of,
    read_rows,
    runs_of,
    save_rows,
)
from quality_runs import figures, pooled
from quality_speculators import drafter_of, training_order
from random_parts import LAYER_IDS, make_drafter
from recipes import (
    Recipe,
    check_size,
    choose,
    read_recipes,
    resolved,
    steps_per_epoch,
)
from safetensors.torch import save_file

from peagle.store.reader import Store
from peagle.train.sampler import PackSampler

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
RECIPES, GROUPS = read_recipes(ROOT / "benchmarks" / "recipes.yaml")
MEASUREMENT = Measurement(steps=7, minutes=None, store="s", evaluation="e")


def written(tmp_path, text):
    path = tmp_path / "recipes.yaml"
    path.write_text(text)
    return path


def row(recipe, seed, accepted, rounds, **changes):
    return {
        "recipe": recipe, "fingerprint": f"f-{recipe}", "seed": seed, "steps": 7, "minutes": None,
        "k": 5, "store": "s", "evaluation": "e", "accepted_by_prompt": accepted,
        "rounds_by_prompt": rounds, "loss": 1.0, "training_hours": 0.5, **changes,
    }  # fmt: skip


def test_every_group_of_the_shipped_recipes_is_compared_with_something():
    assert {"main", "hidden_state", "layers", "embeddings", "depths", "length", "cod", "losses",
            "optimizer", "start", "average"} <= GROUPS.keys()  # fmt: skip
    for name, group in GROUPS.items():
        assert len(set(group.recipes)) == len(group.recipes) > 1, name
    named = {name for group in GROUPS.values() for name in group.recipes}
    assert named == RECIPES.keys()


def test_fit_knows_every_setting_of_the_shipped_recipes():
    """All at once, which is quicker: what one overrides another may override again."""
    everything = {
        key: value for recipe in RECIPES.values() for key, value in recipe.overrides.items()
    }
    order = sorted(everything, key=lambda key: key.count("."))  # a class before its arguments
    everything["model.optimizer"]["class_path"] = "peagle.train.optimizer.MuonAdamW"
    everything["model.optimizer"]["init_args"].pop("weight_decay")
    data = {key: value for recipe in RECIPES.values() for key, value in recipe.data.items()}
    assert set(data) == {"greedy_share", "temperature"}
    ordered = {key: everything[key] for key in order}
    settings = resolved(Recipe("all", "", ordered, data), QUICKSTART)
    assert settings["capture"]["greedy_share"] == data["greedy_share"]
    assert settings["model"]["hidden_state"] == "anchor_scaled"
    assert (
        settings["trainer"]["callbacks"][-1]["class_path"]
        == "peagle.callbacks.average.AveragedWeights"
    )
    assert (
        len(settings["trainer"]["callbacks"]) == 7
    )  # added to the quickstart's, not in their place


def test_no_two_recipes_are_the_same_training():
    prints = {recipe.fingerprint(QUICKSTART) for recipe in RECIPES.values()}
    twins = len(RECIPES) - len(prints)
    assert twins == 0


def test_a_fingerprint_is_of_what_is_trained_and_not_of_where_or_how_it_is_tested(tmp_path):
    text, recipe = QUICKSTART.read_text(), Recipe("a", "", {"model.num_layers": 2})
    moved = written(
        tmp_path, text.replace("outputs/", "elsewhere/").replace("limit: 40", "limit: 3")
    )
    assert moved.read_text() != text
    assert recipe.fingerprint(moved) == recipe.fingerprint(QUICKSTART)
    assert Recipe("b", "x", {"model.num_layers": 2}).fingerprint(moved) == recipe.fingerprint(moved)
    longer = written(tmp_path, text.replace("max_tokens: 512", "max_tokens: 256"))
    assert recipe.fingerprint(longer) != recipe.fingerprint(QUICKSTART)
    assert Recipe("a", "", {}).fingerprint(longer) != recipe.fingerprint(longer)


def test_overrides_become_arguments_that_keep_lists_and_classes_whole():
    overrides = {"model.start": "random", "model.loss": {"ce": 1.0}, "trainer.callbacks+": {"a": 1}}
    assert Recipe("a", "", overrides).arguments() == [
        "--model.start=random", '--model.loss={"ce": 1.0}', '--trainer.callbacks+={"a": 1}'
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("recipes", "groups", "words"),
    [
        ("a: {about: x, overrides: {}}\n  a: {about: y, overrides: {}}", "{}",
         "a is given twice: both would write to one folder"),
        ("A: {about: x, overrides: {}}", "{}", "recipe 'A' names its folder: use a-z"),
        ("a/b: {about: x, overrides: {}}", "{}", "recipe 'a/b' names its folder: use a-z"),
        ("..: {about: x, overrides: {}}", "{}", "recipe '..' names its folder: use a-z"),
        ("a: {about: x, overrides: {run_dir: here}}", "{}", "sets run_dir, which the benchmark"),
        ("a: {about: x, overrides: {capture.seed: 1}}", "{}", "sets capture.seed, which the bench"),
        ("a: {about: x, overrides: {trainer.logger.init_args.path: p}}", "{}", "folder of its own"),
        ("a: {about: x, data: {max_tokens: 9}}", "{}", "data says how the same prompts are"),
        ("a: {about: x, data: {greedy_share: true}}", "{}", "got greedy_share: True"),
        ("a: {about: x, overrides: {}}", "{g: {about: t, recipes: [a, b]}}",
         "group g: there is no 'b'; choose from a"),
    ],
)  # fmt: skip
def test_recipes_that_could_not_be_measured_are_refused(tmp_path, recipes, groups, words):
    path = written(tmp_path, f"groups: {groups}\nrecipes:\n  {recipes}\n")
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        read_recipes(path)


def test_a_name_that_does_not_exist_is_answered_with_those_that_do():
    with pytest.raises(
        ValueError, match=r"there is no 'defualt'; choose from default, paper, eagle3"
    ):
        choose(["default", "defualt"], RECIPES, "recipes.yaml")


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"model.layers": 2}, "unrecognized arguments: --model.layers=2"),
        ({"data.max_tokens": "x"}, "Expected a <class 'int'>. Got value: x"),
        ({"model.start": "own"}, "model.start.*Got value: own"),
    ],
)
def test_a_setting_that_fit_does_not_know_is_refused_with_fits_reason(overrides, words):
    with pytest.raises(ValueError, match=f"recipe 'wrong': fit would refuse it: .*{words}"):
        resolved(Recipe("wrong", "", overrides), QUICKSTART)


def test_an_epoch_is_counted_in_optimizer_steps(random_store):
    """20 training conversations of 10 to 40 tokens."""
    store = Store(random_store)
    lengths = [store.entries[i].tokens - 2 for i in store.split("train")]
    assert len(lengths) == 20
    shortest = min(lengths)
    settings = {"data": {"max_tokens": shortest}, "trainer": {"accumulate_grad_batches": 1}}
    assert steps_per_epoch(store, settings) == lengths.count(shortest) < 20
    settings = {"data": {"max_tokens": 10**6}, "trainer": {"accumulate_grad_batches": 1}}
    assert steps_per_epoch(store, settings) == 1
    settings = {"data": {"max_tokens": 38}, "trainer": {"accumulate_grad_batches": 1}}
    alone = steps_per_epoch(store, settings)
    settings["trainer"]["accumulate_grad_batches"] = 2
    assert sum(lengths) / 38 <= alone < 20 and steps_per_epoch(store, settings) == alone // 2


def test_a_store_too_small_for_the_steps_is_refused():
    recipe = Recipe("default", "", {})
    check_size(recipe, 100, steps=1000, most_epochs=10)
    with pytest.raises(ValueError, match=r"has 100 steps of data, and 1001 steps would repeat it"):
        check_size(recipe, 100, steps=1001, most_epochs=10)


def test_the_mean_is_over_seeds_and_within_a_seed_over_verifications():
    rows = [row("a", 0, [3, 0], [1, 2]), row("a", 1, [6, 6], [2, 2])]
    assert mean_length(rows) == pytest.approx(((1 + 3 / 3) + (1 + 12 / 4)) / 2)


def test_equal_prompts_and_seeds_leave_nothing_uncertain():
    rows = [row("a", seed, [4, 4, 4], [2, 2, 2]) for seed in range(3)]
    assert interval(draw({"a": rows})["a"]) == [3.0, 3.0]


def test_the_interval_is_that_of_the_mean_over_prompts():
    """One verification per prompt: the acceptance length is a plain mean, whose error is known."""
    generator = torch.Generator().manual_seed(1)
    values = torch.randint(0, 6, (200,), generator=generator)
    low, high = interval(draw({"a": [row("a", 0, values.tolist(), [1] * 200)]})["a"])
    error = values.double().std().item() / 200**0.5
    middle = 1 + values.double().mean().item()
    assert low == pytest.approx(middle - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(middle + 1.96 * error, abs=0.15 * error)


def test_seeds_that_differ_widen_the_interval():
    same = [row("a", seed, [4, 4], [2, 2]) for seed in range(3)]
    other = [row("a", seed, [2 * seed, 2 * seed], [2, 2]) for seed in range(3)]
    found = {name: interval(draw({"a": rows})["a"]) for name, rows in (("s", same), ("o", other))}
    assert found["s"][0] == found["s"][1]
    assert found["o"][1] - found["o"][0] > 1


def test_a_ratio_is_taken_over_the_same_prompts():
    """Prompts differ widely, but one drafter is better by a fifth on every one of them."""
    accepted, rounds = [5, 50, 500], [10, 10, 100]
    lengths = [1 + a / r for a, r in zip(accepted, rounds, strict=True)]
    better = [(1.2 * x - 1) * r for x, r in zip(lengths, rounds, strict=True)]
    runs = {"default": [row("default", 0, accepted, rounds)], "b": [row("b", 0, better, rounds)]}
    line = compared(runs, "default")[1]
    assert line["ratio"] == pytest.approx(1.2)
    assert line["ratio_ci95"] == pytest.approx([1.2, 1.2])
    assert line["ci95"][1] - line["ci95"][0] > 1
    assert compared(runs, "default")[0]["ratio"] is None


def test_runs_of_unequal_prompts_are_not_compared():
    with pytest.raises(ValueError, match=r"runs of \[1, 2\] prompts cannot be compared"):
        draw({"a": [row("a", 0, [1], [1])], "b": [row("b", 0, [1, 1], [1, 1])]})


def test_the_summary_is_null_where_nothing_was_measured():
    default = [row("default", 0, [6, 6], [2, 2])]
    found = summary({"default": default, "eagle3": [row("eagle3", 0, [4, 4], [4, 4])]})
    assert found["acceptance_length"] == 4.0
    assert found["ratio_to_eagle3"] == 2.0 and found["ratio_to_eagle3_ci95"] == [2.0, 2.0]
    assert found["ratio_to_speculators"] is None and found["ratio_to_speculators_ci95"] is None
    alone = summary({"speculators": default})
    assert set(alone.values()) == {None} and alone.keys() == found.keys()


def test_results_keep_earlier_runs_and_the_summary_is_of_equal_ones(tmp_path):
    path = tmp_path / "quality.json"
    save_rows(
        path, [row("eagle3", 0, [2, 2], [2, 2]), row("default", 0, [6, 6], [2, 2])], MEASUREMENT
    )
    other = row("default", 0, [8, 8], [2, 2], steps=900)
    head = save_rows(path, [other, row("default", 0, [4, 4], [2, 2])], MEASUREMENT)
    found = json.loads(path.read_text())
    assert [(r["recipe"], r["steps"]) for r in found["rows"]] == [
        ("eagle3", 7), ("default", 900), ("default", 7)
    ]  # fmt: skip
    assert found["summary"] == head
    assert (head["steps"], head["k"], head["temperature"]) == (7, 5, 0.0)
    assert head["ratio_to_eagle3"] == pytest.approx(3 / 2)
    assert head["ratio_to_speculators"] is None
    assert read_rows(path) == found["rows"] and read_rows(tmp_path / "none.json") == []


def test_a_recipe_that_was_changed_counts_in_its_latest_form():
    rows = [row("a", 0, [1], [1], fingerprint="old"), row("a", 1, [1], [1], fingerprint="old"),
            row("a", 0, [2], [1], fingerprint="new")]  # fmt: skip
    assert [r["fingerprint"] for r in runs_of(rows, MEASUREMENT, 5)["a"]] == ["new"]
    assert headline([*rows, row("a", 0, [1], [1], k=3)], MEASUREMENT)[0] == 5
    assert headline([row("a", 0, [1], [1], k=7), row("a", 0, [1], [1], k=3)], MEASUREMENT)[0] == 3
    assert headline(rows, MEASUREMENT._replace(steps=8)) == (None, {})


def test_rows_without_a_temperature_are_greedy_ones():
    old, greedy = row("a", 0, [1], [1]), row("a", 0, [2], [1], temperature=0.0)
    sampled = row("a", 0, [0], [1], temperature=1.0)
    assert key_of(old) == key_of(greedy) != key_of(sampled)
    assert runs_of([old, sampled], MEASUREMENT, 5) == {"a": [old]}
    assert runs_of([old, sampled], MEASUREMENT, 5, 1.0) == {"a": [sampled]}
    assert headline([old, sampled], MEASUREMENT) == (5, {"a": [old]})
    assert headline([sampled], MEASUREMENT) == (None, {})


def test_a_trial_or_equal_time_does_not_take_the_summary_from_what_was_compared_with_peers(
    tmp_path,
):
    path, other = tmp_path / "quality.json", MEASUREMENT._replace(evaluation="four prompts")
    timed = MEASUREMENT._replace(steps=None, minutes=2.0)
    pair = [row("eagle3", 0, [2, 2], [2, 2]), row("default", 0, [6, 6], [2, 2])]
    head = save_rows(path, pair, MEASUREMENT)
    for measurement, names in ((other, ["default"]), (timed, ["default", "eagle3"])):
        new = [row(name, 0, [8, 8], [2, 2], **measurement._asdict()) for name in names]
        assert save_rows(path, new, measurement) == head
    assert len(read_rows(path)) == 5
    new = [row(name, 0, [8, 8], [2, 2], **other._asdict()) for name in ("default", "eagle3")]
    assert save_rows(path, new, other)["evaluation"] == "four prompts"
    alone = save_rows(tmp_path / "b.json", [row("default", 0, [8], [2], **timed._asdict())], timed)
    assert (alone["minutes"], alone["acceptance_length"]) == (2.0, 5.0)


def test_the_table_shows_each_recipe_beside_the_default():
    runs = {"default": [row("default", 0, [4, 4], [2, 2])], "b": [row("b", 0, [6, 6], [2, 2])]}
    lines = format_runs(runs).splitlines()
    assert lines[2].split() == ["default", "1", "3.000", "(3.000-3.000)", "1.000", "30.0"]
    assert lines[3].split() == [
        "b", "1", "4.000", "(4.000-4.000)", "1.333", "(1.333-1.333)", "1.000", "30.0"
    ]  # fmt: skip


def test_the_table_has_a_column_for_every_other_temperature_and_no_loss_of_other_data():
    runs = {"default": [row("default", 0, [4, 4], [2, 2])],
            "b": [row("b", 0, [6, 6], [2, 2], data={"greedy_share": 1.0})]}  # fmt: skip
    sampled = {name: [row(name, 0, [2, 2], [2, 2], temperature=1.0)] for name in runs}
    lines = format_runs(runs, beside={1.0: sampled}).splitlines()
    assert "at temperature 1 (95%)" in lines[0]
    assert lines[2].split() == [
        "default", "1", "3.000", "(3.000-3.000)", "2.000", "(2.000-2.000)", "1.000", "30.0"
    ]  # fmt: skip
    assert lines[3].split() == ["b", "1", "4.000", "(4.000-4.000)", "1.333", "(1.333-1.333)",
                                "2.000", "(2.000-2.000)", "30.0"]  # fmt: skip


def test_prompt_sets_are_taken_together_by_k_and_temperature():
    def part(name, k, accepted, rounds, temperature=0.0):
        return {"prompt_set": name, "k": k, "temperature": temperature, "prompts": len(rounds),
                "lossless_prompts": None if temperature else 1,
                "accepted_by_prompt": accepted, "rounds_by_prompt": rounds}  # fmt: skip

    found = pooled([part("a", 5, [3], [1]), part("a", 3, [2], [1]), part("b", 5, [1, 2], [2, 3]),
                    part("a", 5, [1], [1], 1.0), part("b", 5, [0, 0], [1, 2], 1.0)])  # fmt: skip
    assert [(line["k"], line["temperature"]) for line in found] == [(3, 0.0), (5, 0.0), (5, 1.0)]
    assert found[1] == {
        "k": 5, "temperature": 0.0, "prompts": 3, "lossless_prompts": 2, "acceptance_length": 2.0,
        "accepted_by_prompt": [3, 1, 2], "rounds_by_prompt": [1, 2, 3],
    }  # fmt: skip
    assert found[2]["lossless_prompts"] is None and found[2]["acceptance_length"] == 1.25


def test_a_runs_figures_are_read_from_what_fit_wrote(tmp_path):
    content = {
        "metrics/acceptance.json": {"rows": [{"k": 5, "temperature": 0.0, "prompts": 1,
            "lossless_prompts": 1, "accepted_by_prompt": [4], "rounds_by_prompt": [2]}]},
        "metrics/validate.json": {"loss": 0.5, "teacher_forced_acceptance_length": 2.5,
            "rows": [{"depth": 0, "accuracy": 0.7}, {"depth": 1, "accuracy": 0.4}]},
        "provenance.json": {"training": {"hours": 0.1, "tokens": 99, "steps": 7}},
    }  # fmt: skip
    (tmp_path / "metrics").mkdir()
    for name, value in content.items():
        (tmp_path / name).write_text(json.dumps(value))
    (found,) = figures(tmp_path)
    assert found["acceptance_length"] == 3.0 and found["accuracy"] == [0.7, 0.4]
    assert (found["loss"], found["training_hours"], found["tokens"]) == (0.5, 0.1, 99)


def test_speculators_gets_the_default_recipes_sequences_in_its_order(random_store):
    store, done = Store(random_store), []
    numbers = store.split("train")
    sampler = PackSampler(
        numbers,
        [store.entries[i].tokens - 2 for i in numbers],
        max_tokens=64,
        seed=3,
        rank=0,
        world_size=1,
        done=lambda: len(done),
    )
    for _ in range(3):
        done += [pack.samples for pack in sampler]
    steps = len(done) - 2
    assert steps > 2 * len(sampler) > 8
    expected = [[(store.entries[i].shard, store.entries[i].slot) for i in pack] for pack in done]
    assert training_order(store, 64, 3, steps) == expected[:steps]
    assert training_order(store, 64, 4, steps) != expected[:steps]


def test_speculators_tensors_become_our_drafter_and_others_are_refused(random_store, tmp_path):
    store, path = Store(random_store), tmp_path / "trained.safetensors"
    shape = {"num_layers": 2, "vocab_size": 48, "mask_token_id": 5, "num_depths": 6,
             "layer_ids": list(LAYER_IDS)}  # fmt: skip
    tensors = make_drafter().float().state_dict()
    save_file(tensors, path)
    drafter = drafter_of(path, shape, store)
    assert all(torch.equal(tensors[name], t) for name, t in drafter.state_dict().items())
    assert (drafter.config.num_depths, drafter.config.mask_token_id) == (6, 5)
    save_file({name: t for name, t in tensors.items() if name != "mask_hidden"}, path)
    with pytest.raises(ValueError, match=r"mask_hidden: checkpoint None, ours \(1, 1, 96\)"):
        drafter_of(path, shape, store)
