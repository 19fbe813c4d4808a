"""Runs on a damaged store: they stop, or leave out exactly what is damaged."""

import shutil

import pytest
import toy
from runs import each, finish, last, lines, losses, same_training, start
from safetensors.torch import load_file, save_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
SKIP = ("--data.on_bad_sample=skip", "--data.bad_sample_budget=0.25")


def flip_a_bit(shard):
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)


def truncate(shard):
    shard.write_bytes(shard.read_bytes()[:-1])


def remove(shard):
    shard.unlink()


def change(slot, key, function):
    def damage(shard):
        tensors = load_file(shard)
        tensors[f"{slot}.{key}"] = function(tensors[f"{slot}.{key}"]).contiguous()
        save_file(tensors, shard)

    return damage


# The damage to shard 2, which holds samples 20..29 (24 is for validation), and how many it hits.
DAMAGE = {
    "bit flip": (flip_a_bit, 1),
    "truncation": (truncate, 10),
    "missing shard": (remove, 10),
    "wrong width": (change(3, "aux", lambda t: t[:, 1:]), 1),
    "wrong dtype": (change(3, "aux", lambda t: t.float()), 1),
    "NaN": (change(3, "final", lambda t: t * float("nan")), 1),
    "tokens and states of different length": (change(3, "input_ids", lambda t: t[1:]), 1),
    "other token ids": (change(3, "input_ids", lambda t: t.flip(0)), 1),
}


def damaged(store, folder, kind):
    shutil.copytree(store, folder)
    DAMAGE[kind][0](folder / "shard-00002.safetensors")
    return folder


def test_a_strict_run_stops_and_names_shard_and_sample(store, tmp_path, tally):
    def stopped(kind):
        name = kind.replace(" ", "-")
        broken = damaged(store, tmp_path / f"store-{name}", kind)
        workers = f"--data.num_workers={2 * (len(kind) % 2)}"
        run = start(tmp_path / f"run-{name}", broken, workers)
        code, said = run.wait(), run.said()
        named = "peagle: shard shard-00002.safetensors" in said and "Traceback" not in said
        named &= kind == "missing shard" or "sample 00000000000000" in said
        return "" if code == 1 and named else f"{kind}: exit code {code}: {said[-500:]}"

    tally("damaged store, strict", each(stopped, DAMAGE))


def test_a_tolerant_run_leaves_out_what_is_damaged_and_nothing_else(store, tmp_path, tally):
    finish(tmp_path / "whole", store, inject=[("Documents", {})])
    everything = trained(tmp_path / "whole")

    def left_out(kind):
        name = kind.replace(" ", "-")
        broken = damaged(store, tmp_path / f"store-{name}", kind)
        run_dir = tmp_path / f"run-{name}"
        workers = f"--data.num_workers={2 * (len(kind) % 2)}"
        run = start(run_dir, broken, *SKIP, workers, inject=[("Documents", {})])
        if run.wait() != 0:
            return f"{kind}: {run.said()[-500:]}"
        named = last(run_dir)["HiddenStatesDataModule"]["bad"]
        if len(named) != DAMAGE[kind][1] or run.said().count("left out: shard") != len(named):
            return f"{kind}: {len(named)} counted: {named}"
        numbers = {int(problem.split("sample ")[1][:16], 16) for problem in named}
        names = {name_of(number) for number in numbers}
        # The same documents in the same order, without the damaged ones, step by step.
        wanted = [[n for n in batch if n not in names] or [NOTHING] for batch in everything]
        return "" if trained(run_dir) == wanted else f"{kind}: other samples were trained"

    tally("damaged store, tolerant", each(left_out, DAMAGE))


NOTHING = "0"  # the one token of a document without anything to learn


def name_of(number):
    """How ``injections.Documents`` calls a sample."""
    return ".".join(map(str, toy.make_sample(number).input_ids[1:7].tolist()))


def trained(run_dir):
    return [names for _, _, *names in lines(run_dir / "documents-0.txt")]


@pytest.mark.parametrize("kind", ["bit flip", "missing shard"])
def test_a_tolerant_run_resumes_to_the_bit(store, tmp_path, tally, kind):
    broken = damaged(store, tmp_path / "store", kind)
    finish(tmp_path / "whole", broken, *SKIP)
    run_dir = tmp_path / "run"
    fault = {"batch": 31, "phase": "start", "kill": True}
    assert start(run_dir, broken, *SKIP, inject=[("Fail", fault)]).wait() == -9
    finish(run_dir, broken, *SKIP, "--ckpt_path", "last", "--data.num_workers=2")
    tally(f"tolerant run resumed, {kind}", [same_training(run_dir, tmp_path / "whole")])


def test_more_damage_than_the_budget_ends_the_run(store, tmp_path, tally):
    broken = damaged(store, tmp_path / "store", "truncation")
    run = start(tmp_path / "run", broken, SKIP[0], "--data.bad_sample_budget=0.1")
    code, said = run.wait(), run.said()
    right = code == 1 and "7 samples are damaged" in said and "allows 6 of 60" in said
    assert max(losses(tmp_path / "run")) < 25
    default = start(tmp_path / "default", broken, SKIP[0])
    right &= default.wait() == 1 and "allows 0 of 60" in default.said()
    tally("more damage than the budget", ["" if right else said[-500:]])


@pytest.mark.parametrize("change", ["foreign manifest", "foreign shard", "damaged target head"])
def test_parts_of_another_store_are_refused(store, tmp_path, tally, change):
    broken = tmp_path / "store"
    shutil.copytree(store, broken)
    if change == "damaged target head":
        flip_a_bit(broken / "target.safetensors")
    elif change == "foreign manifest":
        text = (broken / "manifest.json").read_text()
        (broken / "manifest.json").write_text(text.replace("f00d", "0ther"))
    else:
        other = tmp_path / "other"
        toy.make_store(other, identity="0ther")
        for name in ("shard-00003.safetensors", "shard-00003.parquet"):
            shutil.copy(other / name, broken / name)
    run = start(tmp_path / "run", broken, *SKIP)
    code, said = run.wait(), run.said()
    right = code == 1 and "capture again" in said and "Traceback" not in said
    tally(change, ["" if right else said[-500:]])
