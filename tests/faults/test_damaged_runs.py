"""Runs on a damaged store: they stop, or leave out exactly what is damaged."""

import shutil
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
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


@pytest.mark.short
def test_a_strict_run_stops_and_names_shard_and_sample(store, tmp_path, tally):
    def stopped(kind):
        name = kind.replace(" ", "-")
        broken = damaged(store, tmp_path / f"store-{name}", kind)
        workers = f"--data.num_workers={2 * (len(kind) % 2)}"
        run = start(tmp_path / f"run-{name}", broken, workers)
        code, said = run.wait(), run.said()
        if kind == "missing shard":
            named = f"peagle: {broken}: shard shard-00002.safetensors is missing" in said
        else:
            named = "peagle: shard shard-00002.safetensors, sample 00000000000000" in said
        right = code == 1 and named and "Traceback" not in said
        return "" if right else f"{kind}: exit code {code}: {said[-500:]}"

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


@pytest.mark.short
def test_more_damage_than_the_budget_ends_the_run(store, tmp_path, tally):
    broken = damaged(store, tmp_path / "store", "truncation")
    run = start(tmp_path / "run", broken, SKIP[0], "--data.bad_sample_budget=0.1")
    code, said = run.wait(), run.said()
    right = code == 1 and "7 samples are damaged" in said and "allows 6 of 60" in said
    assert max(losses(tmp_path / "run")) < 25
    default = start(tmp_path / "default", broken, SKIP[0])
    right &= default.wait() == 1 and "allows 0 of 60" in default.said()
    tally("more damage than the budget", ["" if right else said[-500:]])


def test_damage_that_one_of_two_ranks_meets_stops_both(store, tmp_path, tally):
    broken = damaged(store, tmp_path / "store", "bit flip")
    run = start(tmp_path / "run", broken, ranks=2)
    codes, said = [run.wait(120), *(process.exitcode for process in run.processes[1:])], run.said()
    right = codes == [1, 1] and "peagle: shard shard-00002.safetensors" in said
    tally("damaged store, two ranks", ["" if right else f"{codes}: {said[-500:]}"])


def change_shard_name(broken: Path, name: str) -> None:
    part = broken / "shard-00002.parquet"
    table = pq.read_table(part)
    names = pa.array([name, *table["shard"].to_pylist()[1:]])
    table = table.set_column(table.schema.get_field_index("shard"), "shard", names)
    pq.write_table(table, part)


def swap(broken: Path, name: str) -> None:
    """Put a file of a store with another target in its place."""
    other = broken.with_name("other")
    toy.make_store(other, replace(toy.make_manifest(), fingerprint="0ther"))
    shutil.copy(other / name, broken / name)


def link(broken: Path, name: str) -> None:
    (broken / name).rename(broken.with_name("elsewhere"))
    (broken / name).symlink_to(broken.with_name("elsewhere"))


def ask_for_code(broken: Path) -> None:
    """transformers would fetch this kernel from the Hub and run it."""
    manifest = toy.make_manifest()
    block = {**manifest.block, "attn_implementation": "somebody/kernel"}
    shutil.rmtree(broken)
    toy.make_store(broken, replace(manifest, block=block))


FOREIGN, OUTSIDE = "belongs to a store of another target", "not a file of this store"
# What is done to the store, and what the run must say.
REFUSED = {
    "foreign manifest": (lambda broken: swap(broken, "manifest.json"), FOREIGN),
    "torn manifest": (lambda broken: truncate(broken / "manifest.json"), "is damaged"),
    "manifest that asks for code": (ask_for_code, "no drafter has: attn_implementation"),
    "foreign shard": (lambda broken: swap(broken, "shard-00003.parquet"), FOREIGN),
    "foreign target head": (lambda broken: swap(broken, "target.safetensors"), FOREIGN),
    "damaged target head": (lambda broken: flip_a_bit(broken / "target.safetensors"), "corrupt"),
    "foreign target layers": (lambda broken: swap(broken, "target_layers.safetensors"), FOREIGN),
    "missing target layers": (
        lambda broken: remove(broken / "target_layers.safetensors"),
        "cannot be read",
    ),
    "torn index": (lambda broken: truncate(broken / "shard-00001.parquet"), "is damaged"),
    "missing part of the index": (
        lambda broken: remove(broken / "shard-00001.parquet"),
        "a part of the index is missing",
    ),
    "shard path with ..": (
        lambda broken: change_shard_name(broken, "../shard-00002.safetensors"),
        OUTSIDE,
    ),
    "absolute shard path": (lambda broken: change_shard_name(broken, "/etc/passwd"), OUTSIDE),
    "symlinked shard": (lambda broken: link(broken, "shard-00002.safetensors"), OUTSIDE),
    "symlinked index": (lambda broken: link(broken, "shard-00002.parquet"), OUTSIDE),
}


@pytest.mark.short
def test_what_makes_the_whole_store_doubtful_is_refused(store, tmp_path, tally):
    """Also by a tolerant run: there is no telling which samples it concerns."""

    def refused(kind: str) -> str:
        folder = tmp_path / kind.replace(" ", "-")
        broken = folder / "store"
        shutil.copytree(store, broken)
        damage, words = REFUSED[kind]
        damage(broken)
        run = start(folder / "run", broken, *SKIP)
        code, said = run.wait(), run.said()
        right = code == 1 and "peagle: " in said and words in said and "Traceback" not in said
        right &= not (folder / "run/losses-0.txt").exists()
        return "" if right else f"{kind}: exit code {code}: {said[-500:]}"

    tally("doubtful store", each(refused, REFUSED))
