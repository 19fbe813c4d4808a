import pytest
import torch
from conftest import VOCABULARY, make_manifest, make_sample

from peagle.cod.rollouts import Cod
from peagle.data.datamodule import PackedSequences, PackSampler, plan_packs
from peagle.data.store import Store, StoreWriter

LENGTHS = [10, 30, 7, 25, 12, 40, 3]


def sampler(world_size=1, rank=0):
    samples = list(range(100, 107))
    return PackSampler(samples, LENGTHS, max_tokens=48, seed=5, rank=rank, world_size=world_size)


def test_every_sample_is_in_one_pack_and_no_pack_is_too_long():
    for epoch in range(20):
        packs = plan_packs(list(range(7)), LENGTHS, max_tokens=48, seed=1, epoch=epoch)
        assert sorted(i for pack in packs for i in pack.samples) == list(range(7))
        assert all(sum(LENGTHS[i] for i in pack.samples) <= 48 for pack in packs)


def test_the_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        return plan_packs(list(range(7)), LENGTHS, max_tokens=48, seed=seed, epoch=epoch)

    assert order(1, 4) == order(1, 4)
    assert order(1, 4) != order(1, 5)
    assert order(1, 4) != order(2, 4)
    assert len({pack.seed for epoch in range(50) for pack in order(1, epoch)}) > 150


def test_a_resumed_epoch_yields_what_was_left():
    whole, resumed = sampler(), sampler()
    whole.resume_at(epoch=3, step=0)
    resumed.resume_at(epoch=3, step=2)
    resumed.set_epoch(3)
    assert list(resumed) == list(whole)[2:]
    assert len(resumed) == len(whole)
    resumed.set_epoch(4)
    whole.set_epoch(4)
    assert list(resumed) == list(whole)


def test_ranks_share_the_packs_evenly():
    alone = list(sampler())
    shares = [list(sampler(world_size=2, rank=rank)) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == len(alone) // 2
    assert [p for pair in zip(*shares, strict=True) for p in pair] == alone[: 2 * len(shares[0])]


def test_too_many_processes_are_refused():
    with pytest.raises(ValueError, match="too few for 50 processes"):
        sampler(world_size=50)


def test_a_batch_holds_its_documents_and_covers_every_anchor_by_segments(random_store):
    store = Store(random_store)
    data = PackedSequences(store, cod=Cod(4, 0.8), max_rows=40, mask_token_id=1)
    packs = plan_packs(
        list(range(6)), [e.tokens - 2 for e in store.entries[:6]], max_tokens=60, seed=0, epoch=0
    )
    batch = data[packs[0]]
    assert len(packs[0].samples) > 1 and len(batch.segments) > 1
    assert len(batch.tokens) == sum(store.entries[i].tokens - 2 for i in packs[0].samples)
    covered = [a for s in batch.segments for a in range(s.start, s.stop)]
    assert covered == list(range(len(batch.tokens)))


def test_a_sample_with_the_mask_token_is_named(random_store):
    store = Store(random_store)
    token = int(store.read(3).input_ids[4])
    data = PackedSequences(store, cod=Cod(), max_rows=100, mask_token_id=token)
    sample = store.entries[3].sample
    with pytest.raises(ValueError, match=f"sample {sample} contains the mask token {token}"):
        data[plan_packs([3], [20], max_tokens=60, seed=0, epoch=0)[0]]


def test_reading_is_lazy_and_by_sample(tmp_path):
    writer = StoreWriter(tmp_path, shard_bytes=1)
    for number in range(3):
        writer.append(f"{number}", "train", make_sample(9, number))
    (tmp_path / "shard-00002.safetensors").write_bytes(b"broken")
    # The index is complete, so the store opens; only the broken sample fails, when it is read.
    make_manifest().write(tmp_path)
    store = Store(tmp_path)
    assert int(store.read(1).input_ids.max()) < VOCABULARY
    with pytest.raises(ValueError, match="shard-00002"):
        store.read(2)
    assert torch.equal(store.read(0).aux, make_sample(9, 0).aux)
