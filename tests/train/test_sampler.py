import pytest
import torch

from peagle.train.sampler import Pack, PackSampler, blocks_of, even_out, fill_packs, shuffle_packs

LENGTHS = [10, 30, 7, 25, 12, 40, 3]
SAMPLES = list(range(100, 107))


def sampler(done=0, world_size=1, rank=0, seed=5, **changes):
    return PackSampler(
        SAMPLES,
        LENGTHS,
        max_tokens=48,
        seed=seed,
        rank=rank,
        world_size=world_size,
        done=lambda: done,
        **changes,
    )


def samples_of(packs):
    return sorted(i for pack in packs for i in getattr(pack, "samples", pack))


@pytest.mark.parametrize("seed", [*range(20), None])
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(seed):
    packs = fill_packs(SAMPLES, LENGTHS, max_tokens=48, seed=seed)
    assert samples_of(packs) == SAMPLES
    assert all(sum(LENGTHS[i - 100] for i in pack) <= 48 for pack in packs)


def test_without_a_seed_the_order_is_the_given_one():
    packs = fill_packs(SAMPLES, LENGTHS, max_tokens=48, seed=None)
    assert packs == [(100, 101, 102), (103, 104), (105, 106)]


@pytest.mark.parametrize("world_size", range(1, 8))
def test_ranks_get_equally_many_packs_and_every_sample_once(world_size):
    length = len(sampler(world_size=world_size))
    for epoch in range(3):
        ranks = [sampler(epoch * length, world_size, rank) for rank in range(world_size)]
        shares = [list(rank) for rank in ranks]
        assert [len(share) for share in shares] == [length] * world_size
        assert samples_of(pack for share in shares for pack in share) == SAMPLES


def test_packs_that_cannot_be_halved_are_filled_up_with_empty_ones():
    shares = [list(sampler(world_size=8, rank=rank)) for rank in range(8)]
    assert [len(share) for share in shares] == [1] * 8
    assert sorted(pack.samples for (pack,) in shares) == [(), *((i,) for i in SAMPLES)]
    assert even_out([(1,), (2,), (3,)], 2) == [(), (1,), (2,), (3,)]


@pytest.mark.parametrize(("limit", "batches"), [(2, 2), (99, 4), (1.0, 4), (0.5, 2), (1, 1)])
def test_each_limited_epoch_begins_its_own_order(limit, batches):
    assert len(sampler()) == 4
    for epoch in range(4):
        for step in range(batches):
            packs = list(sampler(epoch * batches + step, limit=limit))
            assert packs == sampler().epoch(epoch)[step:batches]


def test_overfitting_repeats_the_same_packs_with_the_same_draws():
    first = list(sampler(limit=2, repeat=True))
    assert len(first) == 2 and list(sampler(6, limit=2, repeat=True)) == first


def test_the_largest_pack_is_halved_first():
    assert even_out([(1,), (2, 3, 4, 5), (6, 7)], 2) == [(1,), (2, 3), (4, 5), (6, 7)]


def test_order_and_draws_are_functions_of_seed_and_epoch():
    def order(seed, epoch):
        return shuffle_packs([(i,) for i in range(9)], seed=seed, epoch=epoch)

    assert order(1, 4) == order(1, 4)
    assert [p.samples for p in order(1, 4)] != [p.samples for p in order(1, 5)]
    assert [p.samples for p in order(1, 4)] != [p.samples for p in order(2, 4)]
    assert len({pack.seed for epoch in range(50) for pack in order(1, epoch)}) == 9 * 50


def test_every_place_continues_the_uninterrupted_sequence():
    length = len(sampler())
    assert length >= 3
    whole = [pack for epoch in range(3) for pack in sampler(epoch * length)]
    assert len(whole) == 3 * length
    for done in range(3 * length):
        resumed = sampler(done)
        assert list(resumed) == whole[done : (done // length + 1) * length]
        assert len(resumed) == length


def test_iterating_again_asks_again_how_far_training_is():
    done = [0]
    packs = PackSampler(
        SAMPLES, LENGTHS, max_tokens=48, seed=5, rank=0, world_size=1, done=lambda: done[0]
    )
    first = list(packs)
    assert list(packs) == first
    done[0] = 2
    assert list(packs) == first[2:]


SHARDS = [f"shard-{n}" for n in (0, 0, 1, 2, 1, 3, 4)]  # of the samples


def test_a_block_is_made_of_so_many_shards_and_all_of_their_samples():
    for seed in range(20):
        blocks = blocks_of(SHARDS, size=2, seed=seed)
        shards = {block: {s for s, b in zip(SHARDS, blocks, strict=True) if b == block}
                  for block in blocks}  # fmt: skip
        assert sorted(len(names) for names in shards.values()) == [1, 2, 2]
        assert set().union(*shards.values()) == set(SHARDS)
        assert sum(map(len, shards.values())) == 5, "no shard is in two blocks"
    assert len({tuple(blocks_of(SHARDS, size=2, seed=seed)) for seed in range(20)}) > 5


def blocked(done=0, world_size=1, rank=0, size=2):
    blocks = blocks_of(SHARDS, size=size, seed=5)
    return blocks, PackSampler(
        SAMPLES, LENGTHS, max_tokens=48, seed=5, rank=rank, world_size=world_size,
        done=lambda: done, blocks=blocks,
    )  # fmt: skip


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_finishes_one_block_before_it_begins_another(world_size):
    orders = set()
    for epoch in range(8):
        blocks, packs = blocked(world_size=world_size)
        packs = packs.epoch(epoch)
        assert samples_of(packs) == SAMPLES
        order = [blocks[i - 100] for pack in packs for i in pack.samples]
        assert order == sorted(order, key=order.index)
        orders.add(tuple(dict.fromkeys(order)))
    assert len(orders) > 1, "blocks come in another order in another epoch"


def test_one_block_of_all_shards_is_the_order_without_blocks():
    for done in range(12):
        assert list(blocked(done, size=None)[1]) == list(blocked(done, size=5)[1])
        assert list(blocked(done, size=None)[1]) == list(sampler(done))


def test_without_blocks_nothing_is_drawn_but_order_and_seeds():
    """A checkpoint of an earlier version stands at a place in this order."""
    packs = [(i,) for i in range(9)]
    generator = torch.Generator().manual_seed(7 * 1_000_003 + 2)
    order = torch.randperm(9, generator=generator).tolist()
    seeds = torch.randint(2**62, (9,), generator=generator).tolist()
    expected = [Pack((i,), draw) for i, draw in zip(order, seeds, strict=True)]
    assert shuffle_packs(packs, seed=7, epoch=2) == expected
    assert shuffle_packs(packs, seed=7, epoch=2, blocks=[0] * 9) == expected
