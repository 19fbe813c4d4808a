"""Cutting a sequence into segments: ranges of anchors that are trained one after the other.

The data module cuts by what it expects of the draw. Once rows are drawn they are cut anew, into
about as many pieces, whose numbers of rows suit the hardware.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from peagle.cod.sampling import Rows

ROOM = 1.02  # of a piece, beside the mean: a rest so small is not worth a piece of its own


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

    ``mtp`` runs through the layers: the MTP rows among ``rows``, and behind them as many of the
    next piece's as fill up whole units. Those fillers are computed for nothing.
    """

    rows: Rows
    mtp: Rows


def pieces(rows: Rows, segments: Sequence[Segment], *, unit: int = 1) -> Iterator[Piece]:
    """The drawn rows, cut anew in pieces of about the mean size of the segments.

    Every row is in one piece, and rollouts stay whole. Pieces have equally many MTP rows, in
    multiples of ``unit`` if segments are that large. Their number is hardly above the mean, so that
    there can be one piece more than segments. Where NTP rows stand alone, the number of all rows
    limits a piece.
    """
    mtp = rows.mtp()
    if len(segments) == 1:
        yield Piece(rows, mtp)
        return
    longest = int(rows.depth.max()) + 1 if len(rows.depth) else 1
    mean = len(mtp.anchor) / len(segments)
    whole = int(mean * ROOM / unit) * unit
    size = max(whole or int(mean), longest)
    share = max(whole / mean, 1) if whole else 1
    most = max(int(share * len(rows.anchor) / len(segments)) + unit, longest)
    begins = torch.nonzero(mtp.depth == 1).flatten()
    start = first = 0  # of the piece, among all rows and among MTP rows
    while start < len(rows.anchor):
        stop, cut = len(rows.anchor), len(mtp.anchor)
        last = cut
        if first + size < len(mtp.anchor):
            cut = int(begins[torch.searchsorted(begins, first + size, right=True) - 1])
            stop = int(torch.searchsorted(rows.anchor, mtp.anchor[cut]))
            last = first + size if whole and unit > 1 else cut
        if stop - start > most:
            anchor = rows.anchor[start + most]
            stop = int(torch.searchsorted(rows.anchor, anchor))
            cut = last = int(torch.searchsorted(mtp.anchor, anchor))
        yield Piece(rows.between(start, stop), mtp.between(first, last))
        start, first = stop, cut
