"""How attention on the CPU is cut into tiles of rows and slots.

A softmax can be taken over disjoint tiles of its keys and put together exactly, given each tile's
log-sum-exp (lse). So the slots that a block of rows sees in full need no mask, no mask of [rows,
slots] ever exists, and hardly anything invisible is computed: only the last slots before a diagonal
tile's anchors and the tile's own rollouts are masked, both in one call.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peagle.cod.mask import visible
from peagle.cod.sampling import Rows
from peagle.kernels.cpu.gemm_attention import UNIT

DIAGONAL_ROWS = 256  # rows per masked call: few enough to waste little, enough for the kernel
DIAGONAL_SLOTS = 256  # slots that a diagonal tile takes along rather than leave them to a full one


class Tile(NamedTuple):
    """Rows and NTP slots, computed at once."""

    rows: slice
    slots: slice
    mask: Float[Tensor, "q k"] | None  # over [slots | rows]: 0 where they see, -inf where not


class Tiling(NamedTuple):
    """How the rows of a piece (depth >= 1, sorted) see the slots of NTP and their own rollout, or
    how the slots of NTP see each other.

    A diagonal tile with a mask sees its slots and its own rows as the mask says. One without is of
    slots of NTP, each of which sees those up to itself.
    """

    diagonal: tuple[Tile, ...]  # every row is in one of them
    full: tuple[Tile, ...]  # every row sees every slot


def tile_rollouts(rows: Rows, document: Int[Tensor, " S"]) -> Tiling:
    """Cut what the rows see into tiles, document by document."""
    rollouts = torch.nonzero(rows.depth == 1).flatten()
    number = document[rows.anchor[rollouts]]
    first = torch.ones_like(number, dtype=torch.bool)
    first[1:] = number[1:] != number[:-1]
    cuts = [*rollouts[first].tolist(), len(rows.anchor)]
    begins = torch.searchsorted(document, number[first]).tolist()
    cutter = _Cutter(rows, document, rollouts.tolist(), rows.anchor.tolist())
    tiles = [
        tile
        for begin, (start, stop) in zip(begins, pairwise(cuts), strict=True)
        for tile in cutter.tiles(start, stop, begin)
    ]
    diagonal = tuple(tile for tile in tiles if tile.mask is not None)
    return Tiling(diagonal, tuple(tile for tile in tiles if tile.mask is None))


class _Cutter(NamedTuple):
    rows: Rows
    document: Int[Tensor, " S"]
    rollouts: list[int]  # where each rollout begins
    anchor: list[int]

    def tiles(self, start: int, stop: int, begin: int) -> Iterator[Tile]:
        """What rows of one document see from slot ``begin`` on.

        All of them see what lies before the first anchor; for the rest, each half by itself.
        """
        end = begin + (self.anchor[start] - begin) // UNIT * UNIT  # the rest is on the diagonal
        if end - begin > DIAGONAL_SLOTS:
            yield Tile(slice(start, stop), slice(begin, end), None)
            begin = end
        middle = self.rollouts[bisect_right(self.rollouts, (start + stop) // 2) - 1]
        if stop - start <= DIAGONAL_ROWS or middle <= start:
            yield self.diagonal(start, stop, begin)
            return
        yield from self.tiles(start, middle, begin)
        yield from self.tiles(middle, stop, begin)

    def diagonal(self, start: int, stop: int, begin: int) -> Tile:
        slots = torch.arange(begin, self.anchor[stop - 1] + 1)
        own = Rows(self.rows.anchor[start:stop], self.rows.depth[start:stop])
        keys = Rows(torch.cat([slots, own.anchor]), torch.cat([torch.zeros_like(slots), own.depth]))
        seen = visible(own, keys, self.document)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
        return Tile(slice(start, stop), slice(begin, begin + len(slots)), mask)


def tile_documents(document_lengths: list[int], size: int | None) -> Tiling:
    """Documents as they are, or cut into diagonal tiles of up to ``size`` slots (two units at
    least) and what lies before each."""
    cuts = [0, *accumulate(document_lengths)]
    spans = [span for begin, end in pairwise(cuts) for span in halves(begin, end, size)]
    diagonal = tuple(Tile(rows, slots, None) for rows, slots in spans if rows == slots)
    full = tuple(Tile(rows, slots, None) for rows, slots in spans if rows != slots)
    return Tiling(diagonal, full)


def halves(begin: int, end: int, size: int | None) -> Iterator[tuple[slice, slice]]:
    """Each half by itself, and what the second half sees of the first: all of it."""
    if size is None or end - begin <= size:
        yield slice(begin, end), slice(begin, end)
        return
    middle = begin + math.ceil((end - begin) / 2 / UNIT) * UNIT
    yield from halves(begin, middle, size)
    yield from halves(middle, end, size)
    yield slice(middle, end), slice(begin, middle)
