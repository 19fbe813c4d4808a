"""Attention of rows to slots that all of them see, as matrix products.

torch's flash kernel searches each row's largest score before it may take an exponential, and its
own products are slow: in bf16 on a CPU without tiles for them, in float32 where MKL is
(``onednn.py``). Here the rows come with the log-sum-exp of what they have attended to already
(their leaf first, ``attention_plan.py``), so that ``exp(score - norm)`` needs no maximum: it is
what a slot weighs beside what was seen before. ``norm`` is subtracted inside the product, by
columns of its own; in bf16 what is rounded is the difference, and the exponential (of base two: the
faster one) is the only pass over it.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from peagle.model.held import at_least_float
from peagle.model.onednn import plain_products

# Rows and slots, at most, whose weights exist at a time: whole units. In float32 of one key/value
# head, else of all.
TILE = 1280
UNIT = 128  # tiles are multiples of it: oneDNN makes code for each size, and keeps that of few


def weigh(
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "1 G S E"],
    value: Float[Tensor, "1 G S E"],
    norm: Float[Tensor, "R G T"],
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "R G T"]]:
    """Values summed by ``exp(score - norm)``, and the sum of these weights.

    Both add up in float32 or better what each tile has added up and rounded to the query's
    precision. Either is infinite where a score exceeds ``norm`` by more than that can say.
    """
    scores = _Scores(stacked(query), key[0], stacked(norm))
    total = query.new_zeros(*scores.shape, query.shape[3], dtype=precise(query))
    weight = total.new_zeros(scores.shape)
    by_slots = [scores.keys, tiles(value[0])]
    by_rows = [scores.queries, evenly(total), evenly(weight)]
    for keys, values, queries, sums, counts in each(by_slots, by_rows):
        weights = scores.exponential(queries, keys)
        sums += plain_products(weights, values)
        counts += weights.sum(-1)
        del weights  # in float32, so that the next are given the same memory
    return unstacked(total, query), unstacked(weight, query)


def weigh_backward(
    grad: Float[Tensor, "R G T E"],
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "1 G S E"],
    value: Float[Tensor, "1 G S E"],
    shift: Float[Tensor, "R G T"],
    norm: Float[Tensor, "R G T"],
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "1 G S E"], Float[Tensor, "1 G S E"]]:
    """Gradients of query, key and value; ``norm`` and what the rows attend to, whose product with
    ``grad`` is ``shift``, are of all that they see."""
    scores, width = _Scores(stacked(query), key[0], stacked(norm)), query.shape[3]
    slope = shifted(stacked(grad), -stacked(shift))
    for_query = query.new_zeros(*scores.shape, width, dtype=precise(query))
    for_key, for_value = for_query.new_zeros(2, key.shape[1], width, key.shape[2])
    by_slots = [scores.keys, tiles(key[0]), with_ones(value[0])]
    by_slots += [evenly(x, dim=2) for x in (for_key, for_value)]
    by_rows = [scores.queries, across(scores.queries, width), slope, across(slope, width)]
    for tile in each(by_slots, [*by_rows, evenly(for_query)]):
        keys, upright, values, sum_key, sum_value, *rows = tile
        queries, queries_across, onward, onward_across, sum_query = rows
        weights = scores.exponential(queries, keys)
        sum_value += plain_products(onward_across, weights)
        weights *= plain_products(onward, values.mT)
        sum_query += plain_products(weights, upright)
        sum_key += plain_products(queries_across, weights)
        del weights
    for_query *= scores.scale
    for_key *= scores.scale / scores.stretch
    return unstacked(for_query, query), for_key.mT[None], for_value.mT[None]


class _Scores:
    """Tiles of queries and keys with the columns that subtract ``norm``."""

    def __init__(
        self,
        query: Float[Tensor, "G N E"],
        key: Float[Tensor, "G S E"],
        norm: Float[Tensor, "G N"],
    ):
        self.scale = query.shape[2] ** -0.5
        binary = self.scale / math.log(2)
        # Queries are stretched before the product; in bf16, where that would round them again, what
        # they are multiplied to is.
        self.stretch = 1.0 if query.dtype == torch.bfloat16 else binary
        self.factor = binary / self.stretch
        stretched = query if self.stretch == 1 else query * self.stretch
        self.queries = shifted(stretched, norm * (-self.stretch / self.scale))
        self.keys = with_ones(key)
        self.shape = (len(query), sum(tile.shape[1] for tile in self.queries))
        largest = max(tile.shape[1] for tile in self.queries), max(t.shape[1] for t in self.keys)
        self.room = query.new_empty(len(query) * math.prod(largest) if self.factor != 1 else 0)

    def exponential(
        self, queries: Float[Tensor, "G n C"], keys: Float[Tensor, "G s C"]
    ) -> Float[Tensor, "G n s"]:
        """``exp(score - norm)`` of a tile."""
        if self.factor == 1:
            return plain_products(queries, keys.mT).exp2_()
        shape = (*queries.shape[:2], keys.shape[1])
        scores = self.room[: math.prod(shape)].view(shape)
        torch.baddbmm(scores, queries, keys.mT, beta=0, alpha=self.factor, out=scores)
        return scores.exp2_()


def each(
    by_slots: list[Sequence[Float[Tensor, "G ..."]]],
    by_rows: list[Sequence[Float[Tensor, "G ..."]]],
) -> Iterator[tuple[Float[Tensor, "g ..."], ...]]:
    """What belongs to each tile, of slots and of rows; of one head after the other where oneDNN has
    to be asked for each."""
    for there, here in product(zip(*by_slots, strict=True), zip(*by_rows, strict=True)):
        tile = (*there, *here)
        count = 1 if tile[0].dtype == torch.float32 else len(tile[0])
        yield from zip(*(x.split(count) for x in tile), strict=True)


def tiles(x: Float[Tensor, "G N E"]) -> list[Float[Tensor, "G _ E"]]:
    """Each in one piece of memory, as the products want it."""
    return [tile.contiguous() for tile in evenly(x)]


def across(found: list[Float[Tensor, "G _ C"]], width: int) -> list[Float[Tensor, "G E _"]]:
    """The first ``width`` columns as rows: the products want what they sum over side by side."""
    return [tile[..., :width].mT.contiguous() for tile in found]


def evenly(x: Float[Tensor, "..."], dim: int = 1) -> tuple[Float[Tensor, "..."], ...]:
    """In parts of about one size, of whole units except for the last."""
    count = x.shape[dim]
    units, parts = math.ceil(count / UNIT), math.ceil(count / TILE)
    cuts = [UNIT * (units * part // parts) for part in range(1, parts)]
    return x.tensor_split(cuts, dim)


def stacked(x: Float[Tensor, "R G T *E"]) -> Float[Tensor, "G N *E"]:
    """The rows of all heads that share a key/value head, one after the other."""
    return x.transpose(0, 1).flatten(1, 2)


def unstacked(
    x: Float[Tensor, "G N *E"], like: Float[Tensor, "R G T F"]
) -> Float[Tensor, "R G T *E"]:
    """Each head by itself again, without the rows that ``shifted`` has added."""
    heads, _, rows, _ = like.shape
    return x[:, : heads * rows].unflatten(1, (heads, rows)).transpose(0, 1)


def precise(x: Float[Tensor, "..."]) -> torch.dtype:
    """What sums are kept in."""
    return at_least_float(x.dtype)


def columns(dtype: torch.dtype) -> int:
    """A float32 is the sum of three bf16."""
    return 3 if dtype == torch.bfloat16 else 1


def shifted(x: Float[Tensor, "G N E"], shift: Float[Tensor, "G N"]) -> list[Float[Tensor, "G _ C"]]:
    """Tiles of ``x`` with columns that add up to ``shift``, and rows of zeros up to a unit."""
    rows = torch.cat([x, split(shift, x.dtype)], 2)
    return tiles(F.pad(rows, (0, 0, 0, -rows.shape[1] % UNIT)))


def split(x: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "... C"]:
    """Parts in ``dtype`` that add up to ``x``."""
    parts = []
    for _ in range(columns(dtype)):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(x.dtype)
    return torch.stack(parts, -1)


def with_ones(x: Float[Tensor, "G S E"]) -> list[Float[Tensor, "G _ C"]]:
    """Tiles of ``x`` with what takes up the columns of ``shifted``."""
    ones = x.new_ones(*x.shape[:2], columns(x.dtype))
    return tiles(torch.cat([x, ones], 2))
