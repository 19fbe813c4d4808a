"""In which order the packs of a store are trained: a function of the seed and of counting.

samples -> packs (once per run) -> shuffled per epoch -> dealt to the ranks in turn

Packs are filled once, so every epoch has equally many steps: the schedule, and the place that a
number of finished batches stands for, are the same in a resumed run as in an uninterrupted one.

With blocks (each the samples of some shards) a pack has samples of one block, and an epoch goes
through one block after the other: shards that come from afar are then needed once an epoch.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.data import Sampler


class Pack(NamedTuple):
    """The samples of one packed sequence, and the seed of its COD draw."""

    samples: tuple[int, ...]
    seed: int


def blocks_of(shards: list[str], *, size: int | None, seed: int) -> list[int]:
    """The block of each sample, from the shard of each: ``size`` shards drawn at random make one.

    Neighbouring shards hold similar prompts, hence the draw. ``None`` makes one block of all.
    """
    names = sorted(set(shards))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randperm(len(names), generator=generator).tolist()
    block = {names[i]: place // (size or len(names)) for place, i in enumerate(drawn)}
    return [block[shard] for shard in shards]


def fill_packs(
    samples: list[int],
    lengths: list[int],
    *,
    max_tokens: int,
    seed: int | None,
    blocks: list[int] | None = None,
) -> list[tuple[int, ...]]:
    """Groups of samples of at most ``max_tokens`` slots; ``seed=None`` keeps the given order.

    ``lengths`` are slots per sample, ``blocks`` their blocks. Every sample is in exactly one group.
    """
    order = list(range(len(samples)))
    if seed is not None:
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(samples), generator=generator).tolist()
    blocks = blocks or [0] * len(samples)
    order.sort(key=blocks.__getitem__)  # within a block as they were
    packs: list[list[int]] = []
    room, block = 0, None
    for i in order:
        if lengths[i] > room or blocks[i] != block:
            packs.append([])
            room, block = max_tokens, blocks[i]
        packs[-1].append(samples[i])
        room -= lengths[i]
    return [tuple(members) for members in packs]


def even_out(packs: list[tuple[int, ...]], world_size: int) -> list[tuple[int, ...]]:
    """Halve the largest packs until all ranks get equally many; nothing is dropped or repeated.

    Where every pack is one sample, empty packs fill up: a rank that has one trains no row.
    """
    packs = list(packs)
    while len(packs) % world_size:
        largest = max(range(len(packs)), key=lambda i: len(packs[i]))
        members, half = packs[largest], len(packs[largest]) // 2
        packs[largest] = members[half:]
        packs.insert(largest, members[:half])
    return packs


def shuffle_packs(
    packs: list[tuple[int, ...]], *, seed: int, epoch: int, blocks: list[int] | None = None
) -> list[Pack]:
    """The order of an epoch, and the seed of each pack's COD draw in it.

    ``blocks`` are those of the packs; one is finished before another begins.
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(len(packs), generator=generator).tolist()
    seeds = torch.randint(2**62, (len(packs),), generator=generator).tolist()
    if blocks is not None:
        turns = torch.randperm(max(blocks) + 1, generator=generator).tolist()
        order.sort(key=lambda i: turns[blocks[i]])
    return [Pack(packs[i], draw) for i, draw in zip(order, seeds, strict=True)]


class PackSampler(Sampler[Pack]):
    """The packs of one rank, epoch after epoch, from wherever training stands.

    Iterating asks ``done`` how many batches this rank has finished since the run began and yields
    the rest of that epoch. Lightning's own epoch counter plays no part: it differs between a
    checkpoint written in the middle and one written at the end of an epoch.

    Args:
        limit: batches of an epoch, as Lightning's ``limit_train_batches``: an integer counts, a
            float is a share. The next epoch is shuffled anew all the same.
        repeat: train the first epoch again and again, with the same COD draws.
    """

    def __init__(
        self,
        samples: list[int],
        lengths: list[int],
        *,
        max_tokens: int,
        seed: int,
        rank: int,
        world_size: int,
        done: Callable[[], int],
        blocks: list[int] | None = None,
        limit: int | float = 1.0,
        repeat: bool = False,
    ):
        groups = fill_packs(samples, lengths, max_tokens=max_tokens, seed=seed, blocks=blocks)
        self.packs = even_out(groups, world_size)
        block = dict(zip(samples, blocks or [0] * len(samples), strict=True))
        self.blocks = [block[members[0]] if members else 0 for members in self.packs]
        self.seed, self.rank, self.world_size, self.done = seed, rank, world_size, done
        share = min(len(self), limit) if isinstance(limit, int) else int(len(self) * limit)
        self.limit, self.repeat = max(1, share), repeat  # Lightning refuses or skips 0

    def __len__(self) -> int:
        """Batches of a whole epoch, also when resumed inside one."""
        return len(self.packs) // self.world_size

    def __iter__(self) -> Iterator[Pack]:
        epoch, step = divmod(self.done(), self.limit)
        packs = self.epoch(0 if self.repeat else epoch)
        return iter(packs[self.rank :: self.world_size][step : self.limit])

    def epoch(self, number: int) -> list[Pack]:
        """The packs of all ranks."""
        return shuffle_packs(self.packs, seed=self.seed, epoch=number, blocks=self.blocks)


def refuse_other_order(saved: dict[str, Any], ours: dict[str, Any]) -> None:
    """Raise ``ValueError`` with the differences; ``saved`` is empty when nothing is resumed."""
    differences = [
        f"{key}: checkpoint {saved.get(key)!r}, this run {ours.get(key)!r}"
        for key in (saved | ours if saved else ())  # what an earlier version did not know is None
        if saved.get(key) != ours.get(key)
    ]
    if differences:
        raise ValueError(
            "the checkpoint stands at a place in another order of the data, and would repeat some "
            f"samples and miss others here ({'; '.join(differences)}): resume with the same values"
        )
