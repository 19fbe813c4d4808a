"""Conditional drop-token (COD) sampling: which rows are trained (paper section 2.2, "COD")."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Cod:
    """How deep rollouts are trained and how fast they thin out.

    Args:
        num_depths: K; one row of depth 0 and up to K - 1 deeper ones per anchor.
        keep_ratio: r; depth d keeps about r**d of the anchors. 1 keeps every row.
        min_keep_ratio: lower bound of r**d. The paper has none; some trainers use 0.2.

    Raises:
        ValueError: for values outside their range.
    """

    num_depths: int = 8
    keep_ratio: float = 0.8
    min_keep_ratio: float = 0.0

    def __post_init__(self) -> None:
        if self.num_depths < 1:
            raise ValueError(f"num_depths must be at least 1, got {self.num_depths}")
        if not 0 < self.keep_ratio <= 1:
            raise ValueError(f"keep_ratio must lie in (0, 1], got {self.keep_ratio}")
        if not 0 <= self.min_keep_ratio <= 1:
            raise ValueError(f"min_keep_ratio must lie in [0, 1], got {self.min_keep_ratio}")

    def share(self, depth: int) -> float:
        """Share of the anchors that depth ``depth`` keeps at most."""
        return max(self.keep_ratio**depth, self.min_keep_ratio)

    def mtp_share(self) -> float:
        """Share of the rows that are of depth 1 or more, at most."""
        return 1 - 1 / sum(self.share(depth) for depth in range(self.num_depths))

    def keeping_all(self) -> "Cod":
        """The same depths without any dropping: what validation looks at."""
        return Cod(self.num_depths, 1.0, 0.0)


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
        return self.between(*torch.searchsorted(self.anchor, bounds).tolist())

    def between(self, first: int, last: int) -> "Rows":
        """The rows ``first`` to ``last - 1`` in their order."""
        return Rows(self.anchor[first:last], self.depth[first:last])

    def mtp(self) -> "Rows":
        """The rows of depth >= 1."""
        return self.where(self.depth > 0)

    def where(self, keep: Bool[Tensor, " N"]) -> "Rows":
        return Rows(self.anchor[keep], self.depth[keep])

    def to(self, device: torch.device) -> "Rows":
        return Rows(
            self.anchor.to(device, non_blocking=True), self.depth.to(device, non_blocking=True)
        )


def sample_rows(
    supervised: Bool[Tensor, " S"],
    document: Int[Tensor, " S"],
    *,
    cod: Cod,
    generator: torch.Generator | None,
) -> Rows:
    """Keep every supervised row of depth 0 (NTP) and geometrically fewer MTP rows of each depth.

    Depth ``d`` keeps at most ``cod.share(d)`` of the anchors that have a depth 1 at all, drawn only
    from the anchors that survived depth ``d - 1``. The pack has one quota per depth, since rounding
    down in every document would leave short documents no deep rows; documents share it by their
    sizes, to about one row.
    A rollout is therefore a hole-free prefix ``0..d``: it never leaves its document or its run
    of supervised slots, and the attention rule never has to ask whether a parent exists.

        anchor    0  1  2  3  4  5
        depth 0   x  x  x  x  x  x
        depth 1   x  x  .  x  x
        depth 2   x  .  .  x

    One order of the anchors decides all depths: those kept at a depth are the first of those kept
    before, and need no second draw.
    """
    assert torch.all(document[1:] >= document[:-1]), "documents must be numbered in order"
    longest = reach(supervised, document, cod.num_depths)
    lengths = supervised.long()
    if cod.num_depths > 1:
        order = preference(longest > 1, document, generator)
        lengths[order] += mtp_rows(longest[order], cod)
    return rows_of(lengths)


def preference(
    candidate: Bool[Tensor, " S"], document: Int[Tensor, " S"], generator: torch.Generator | None
) -> Int[Tensor, " S"]:
    """The anchors in random order, in which every stretch holds about its share of each document.

    The candidates of a document are shuffled and spread evenly over 0..1, from a random offset on.
    """

    def uniform(count: int) -> Tensor:
        return torch.rand(count, generator=generator, device=document.device, dtype=torch.float64)

    shuffled = torch.argsort(document + uniform(len(document)))  # by document, then at random
    size = torch.bincount(document, weights=candidate.double())
    rank = torch.empty_like(size[document])
    rank[shuffled] = torch.cumsum(candidate[shuffled].double(), 0)
    rank -= (torch.cumsum(size, 0) - size)[document] + uniform(len(size))[document]
    place = torch.where(candidate, rank / size.clamp(min=1)[document], 2.0)
    return torch.argsort(place)


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


def mtp_rows(longest: Int[Tensor, " S"], cod: Cod) -> Int[Tensor, " S"]:
    """How many rows beyond depth 0 each anchor keeps; anchors come in order of preference."""
    alive = longest > 1
    candidates = int(alive.sum())
    count = torch.zeros_like(longest)
    for depth in range(1, cod.num_depths):
        quota = int(candidates * cod.share(depth) + 1e-9)  # 0.7 * 10 is 6.999...
        alive &= longest > depth
        alive &= torch.cumsum(alive, 0) <= quota
        count += alive
    return count


def rows_of(lengths: Int[Tensor, " S"]) -> Rows:
    """Rows of rollouts with the given lengths, one per anchor."""
    anchor = torch.repeat_interleave(lengths)
    start = torch.cumsum(lengths, 0) - lengths
    depth = torch.arange(len(anchor), device=lengths.device) - start[anchor]
    return Rows(anchor, depth)


def expected_rows(
    supervised: Bool[Tensor, " S"], document: Int[Tensor, " S"], *, cod: Cod
) -> Float[Tensor, " S"]:
    """Expected number of rows of each anchor, for balancing segments before the draw."""
    longest = reach(supervised, document, cod.num_depths)
    reaching = [int((longest > depth).sum()) for depth in range(cod.num_depths)]
    kept = torch.tensor(expected_per_depth(reaching, cod)) / torch.tensor(reaching).clamp(min=1)
    return torch.cat([torch.zeros(1), torch.cumsum(kept, 0)])[longest]


def expected_per_depth(reaching: list[int], cod: Cod) -> list[float]:
    """Rows of each depth in a pack, of which ``reaching[d]`` anchors have a row of depth ``d``.

    Anchors that survived depth ``d - 1`` reach depth ``d`` as often as all others that reached
    ``d - 1``; the quota of the pack limits what is left.
    """
    rows = [float(reaching[0])]
    for depth in range(1, cod.num_depths):
        left = rows[-1] * reaching[depth] / max(reaching[depth - 1], 1)
        rows.append(min(left, reaching[1] * cod.share(depth)))
    return rows
