"""How attention on the CPU is cut into parts: which rows see which slots.

A softmax can be taken over disjoint parts of its keys and put together exactly, given each part's
log-sum-exp. So the slots that a block of rows sees in full need no mask, no mask of [rows, prefix]
ever exists, and hardly anything invisible is computed: only the last slots before a leaf's anchors
and the leaf's own rollouts are masked, both in one call.
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

LEAF_ROWS = 256  # rows per masked call: few enough to waste little, enough for the kernel
LEAF_SLOTS = 256  # slots that a leaf takes along rather than leave them to a call of their own


class Places(NamedTuple):
    """Where the rows of a part stand. Rows of other anchors may stand at the same slot."""

    first: Int[Tensor, " U"]  # the first row at each place
    of: Int[Tensor, " q"]  # each row's place


class Part(NamedTuple):
    """Rows and depth-0 slots, computed at once."""

    rows: slice
    slots: slice
    mask: Float[Tensor, "q k"] | None  # over [slots | rows]: 0 where they see, -inf where not
    places: Places | None = None

    def bias(self, dtype: torch.dtype) -> Float[Tensor, "q k"] | None:
        """What is added to the scores."""
        return None if self.mask is None else self.mask.to(dtype)


class Plan(NamedTuple):
    """How the rows of a piece (depth >= 1, sorted) see the prefix and their own rollout, or how
    the slots of depth 0 see each other.

    A leaf with a mask sees its slots and its own rows as the mask says; one without is of slots of
    depth 0, each of which sees those up to itself.
    """

    leaves: tuple[Part, ...]  # every row is in one of them
    full: tuple[Part, ...]  # every row sees every slot


def plan_flash(rows: Rows, document: Int[Tensor, " S"]) -> Plan:
    """Cut what the rows see into parts, document by document."""
    rollouts = torch.nonzero(rows.depth == 1).flatten()
    number = document[rows.anchor[rollouts]]
    first = torch.ones_like(number, dtype=torch.bool)
    first[1:] = number[1:] != number[:-1]
    cuts = [*rollouts[first].tolist(), len(rows.anchor)]
    begins = torch.searchsorted(document, number[first]).tolist()
    layout = _Layout(rows, document, rollouts.tolist(), rows.anchor.tolist())
    found = [
        part
        for begin, (start, stop) in zip(begins, pairwise(cuts), strict=True)
        for part in layout.parts(start, stop, begin)
    ]
    leaves = tuple(part for part in found if part.mask is not None)
    full = (part for part in found if part.mask is None)
    return Plan(leaves, tuple(p._replace(places=places(rows.position[p.rows])) for p in full))


def places(position: Int[Tensor, " q"]) -> Places:
    """Rows by their position."""
    distinct, of = torch.unique(position, return_inverse=True)
    number = torch.arange(len(position))
    first = torch.empty_like(distinct).scatter_reduce_(0, of, number, "amin", include_self=False)
    return Places(first, of)


class _Layout(NamedTuple):
    rows: Rows
    document: Int[Tensor, " S"]
    rollouts: list[int]  # where each rollout begins
    anchor: list[int]

    def parts(self, start: int, stop: int, begin: int) -> Iterator[Part]:
        """What rows of one document see from slot ``begin`` on.

        All of them see what lies before the first anchor; for the rest, each half by itself.
        """
        end = begin + (self.anchor[start] - begin) // UNIT * UNIT  # the rest goes to the leaves
        if end - begin > LEAF_SLOTS:
            yield Part(slice(start, stop), slice(begin, end), None)
            begin = end
        middle = self.rollouts[bisect_right(self.rollouts, (start + stop) // 2) - 1]
        if stop - start <= LEAF_ROWS or middle <= start:
            yield self.leaf(start, stop, begin)
            return
        yield from self.parts(start, middle, begin)
        yield from self.parts(middle, stop, begin)

    def leaf(self, start: int, stop: int, begin: int) -> Part:
        slots = torch.arange(begin, self.anchor[stop - 1] + 1)
        own = Rows(self.rows.anchor[start:stop], self.rows.depth[start:stop])
        keys = Rows(torch.cat([slots, own.anchor]), torch.cat([torch.zeros_like(slots), own.depth]))
        seen = visible(own, keys, self.document)
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
        return Part(slice(start, stop), slice(begin, begin + len(slots)), mask)


def plan_causal(document_lengths: list[int], leaf: int | None) -> Plan:
    """Documents as they are, or cut into leaves of up to so many slots (two units at least) and
    what lies before."""
    cuts = [0, *accumulate(document_lengths)]
    spans = [span for begin, end in pairwise(cuts) for span in halves(begin, end, leaf)]
    leaves = tuple(Part(rows, slots, None) for rows, slots in spans if rows == slots)
    full = tuple(Part(rows, slots, None) for rows, slots in spans if rows != slots)
    return Plan(leaves, full)


def halves(begin: int, end: int, leaf: int | None) -> Iterator[tuple[slice, slice]]:
    """Each half by itself, and what the second half sees of the first: all of it."""
    if leaf is None or end - begin <= leaf:
        yield slice(begin, end), slice(begin, end)
        return
    middle = begin + math.ceil((end - begin) / 2 / UNIT) * UNIT
    yield from halves(begin, middle, leaf)
    yield from halves(middle, end, leaf)
    yield slice(middle, end), slice(begin, middle)
