"""Cutting a sequence into segments: ranges of anchors that are trained one after the other.

The data module cuts by what it expects of the draw; once rows are drawn, the cuts are moved a
little, to where the numbers of rows suit the hardware.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from peagle.cod.rollouts import Rows

UNIT = 64  # rows of depth 1 and more come in multiples of it: oneDNN makes code for each number


class Segment(NamedTuple):
    """The anchors ``start <= anchor < stop``."""

    start: int
    stop: int


def partition(expected: Float[Tensor, " S"], *, max_rows: int) -> tuple[Segment, ...]:
    """Cut the anchors into the fewest ranges of about equal rows, ``max_rows`` each at most.

    ``expected`` is the expected number of rows of each anchor, so a segment of the actual draw
    can be a few rows larger. Together the segments cover every anchor exactly once.

    Raises:
        ValueError: if ``max_rows`` is smaller than one rollout.
    """
    largest = float(expected.max()) if len(expected) else 0.0
    if max_rows < largest:
        raise ValueError(f"max_rows must hold one rollout ({math.ceil(largest)}), got {max_rows}")
    total = torch.cumsum(expected.double(), 0)
    count = max(1, math.ceil(float(total[-1]) / max_rows))
    limits = torch.arange(1, count, dtype=torch.float64) * float(total[-1]) / count
    cuts = [0, *(torch.searchsorted(total, limits) + 1).tolist(), len(expected)]
    return tuple(Segment(a, b) for a, b in pairwise(cuts) if a < b)


class Piece(NamedTuple):
    """What is trained in one backward pass.

    ``deeper`` runs through the layers: the rows of depth 1 and more among ``rows``, and behind
    them as many of the next piece's as fill up whole units. Those are computed for nothing.
    """

    rows: Rows
    deeper: Rows


def pieces(rows: Rows, segments: Sequence[Segment]) -> Iterator[Piece]:
    """The drawn rows, in pieces no larger than the segments are on average.

    Every row is in one piece, and rollouts stay whole. All but the last have equally many deeper
    rows, in whole units unless segments are smaller than one.
    """
    deeper = rows.deeper()
    begins = torch.nonzero(deeper.depth == 1).flatten()
    mean = len(deeper.anchor) // len(segments)
    whole = mean // UNIT * UNIT
    size = max([whole or mean, *deeper.depth.tolist()])  # a rollout at least
    anchor = first = 0
    while first + size < len(deeper.anchor):
        cut = int(begins[torch.searchsorted(begins, first + size, right=True) - 1])
        stop, last = int(deeper.anchor[cut]), first + size if whole else cut
        yield Piece(rows.within(anchor, stop), Rows(*(x[first:last] for x in deeper)))
        anchor, first = stop, cut
    yield Piece(rows.within(anchor, segments[-1].stop), Rows(*(x[first:] for x in deeper)))
