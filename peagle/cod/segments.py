"""Cutting a sequence into segments: ranges of anchors that are trained one after the other."""

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


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
