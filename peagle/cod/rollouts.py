"""Conditional drop-token (COD) sampling: which rows are trained (paper section 2.2, "COD")."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor


class Rows(NamedTuple):
    """Rows sorted by anchor, then depth. The rows of one anchor are its rollout."""

    anchor: Int[Tensor, " N"]
    depth: Int[Tensor, " N"]

    @property
    def position(self) -> Int[Tensor, " N"]:
        """The slot a row stands in for, and the slot whose label it guesses."""
        return self.anchor + self.depth

    def within(self, start: int, stop: int) -> "Rows":
        """The rows of the anchors ``start <= anchor < stop``."""
        bounds = torch.tensor([start, stop], device=self.anchor.device)
        first, last = torch.searchsorted(self.anchor, bounds).tolist()
        return Rows(self.anchor[first:last], self.depth[first:last])

    def deeper(self) -> "Rows":
        """The rows that read the mask token: all but depth 0."""
        keep = self.depth > 0
        return Rows(self.anchor[keep], self.depth[keep])

    def to(self, device: torch.device) -> "Rows":
        return Rows(
            self.anchor.to(device, non_blocking=True), self.depth.to(device, non_blocking=True)
        )


def sample_rows(
    supervised: Bool[Tensor, " S"],
    document: Int[Tensor, " S"],
    *,
    num_depths: int,
    keep_ratio: float,
    min_keep_ratio: float,
    generator: torch.Generator | None,
) -> Rows:
    """Keep every supervised row of depth 0 and geometrically fewer rows of each deeper depth.

    In every document, depth ``d`` keeps at most ``max(keep_ratio ** d, min_keep_ratio)`` of the
    anchors that have a depth 1 at all, drawn only from the anchors that survived depth ``d - 1``.
    A rollout is therefore a hole-free prefix ``0..d``: it never leaves its document or its run
    of supervised slots, and the attention rule never has to ask whether a parent exists.

        anchor    0  1  2  3  4  5
        depth 0   x  x  x  x  x  x
        depth 1   x  x  .  x  x
        depth 2   x  .  .  x

    One uniform number per anchor decides all its depths: the anchors kept at a depth are the
    lowest-numbered of those kept before, a uniform subset of them, and need no second draw.
    """
    assert torch.all(document[1:] >= document[:-1]), "documents must be numbered in order"
    longest = reach(supervised, document, num_depths)
    lengths = supervised.long()
    if num_depths > 1:
        number = torch.rand(
            len(supervised), generator=generator, device=supervised.device, dtype=torch.float64
        )
        order = torch.argsort(document + number)  # by document, then by number
        lengths[order] += deeper_rows(
            longest[order], document[order], num_depths, keep_ratio, min_keep_ratio
        )
    return rows_of(lengths)


def reach(
    supervised: Bool[Tensor, " S"], document: Int[Tensor, " S"], num_depths: int
) -> Int[Tensor, " S"]:
    """Length of the longest rollout of each anchor, at most ``num_depths``; 0 if unsupervised."""
    alive = supervised.clone()
    longest = alive.long()
    for depth in range(1, num_depths):
        alive[-depth:] = False
        alive[:-depth] &= supervised[depth:] & (document[depth:] == document[:-depth])
        longest += alive
    return longest


def deeper_rows(
    longest: Int[Tensor, " S"],
    document: Int[Tensor, " S"],
    num_depths: int,
    keep_ratio: float,
    min_keep_ratio: float,
) -> Int[Tensor, " S"]:
    """How many rows beyond depth 0 each anchor keeps; anchors come in order of preference."""
    alive = longest > 1
    candidates = torch.bincount(document, weights=alive.double())
    first = torch.searchsorted(document, document)  # where each anchor's document starts
    count = torch.zeros_like(longest)
    for depth in range(1, num_depths):
        share = max(keep_ratio**depth, min_keep_ratio)
        quota = torch.floor(candidates * share + 1e-9)  # 0.7 * 10 is 6.999...
        alive &= longest > depth
        seen = torch.cumsum(alive, 0)
        alive &= seen - (seen - alive.long())[first] <= quota[document]
        count += alive
    return count


def rows_of(lengths: Int[Tensor, " S"]) -> Rows:
    """Rows of rollouts with the given lengths, one per anchor."""
    anchor = torch.repeat_interleave(lengths)
    start = torch.cumsum(lengths, 0) - lengths
    depth = torch.arange(len(anchor), device=lengths.device) - start[anchor]
    return Rows(anchor, depth)


def expected_rows(
    supervised: Bool[Tensor, " S"],
    document: Int[Tensor, " S"],
    *,
    num_depths: int,
    keep_ratio: float,
    min_keep_ratio: float,
) -> Tensor:
    """Expected number of rows of each anchor, for balancing segments before the draw; [S]."""
    shares = torch.tensor([max(keep_ratio**d, min_keep_ratio) for d in range(num_depths)])
    total = torch.cat([torch.zeros(1), torch.cumsum(shares, 0)])
    return total[reach(supervised, document, num_depths)]
