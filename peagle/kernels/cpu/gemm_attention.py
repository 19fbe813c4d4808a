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

from peagle.kernels.cpu.onednn import plain_products
from peagle.kernels.grad_accumulation import at_least_float

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
    for_key, for_value = query.new_zeros(2, *key.shape[1:], dtype=precise(query))
    for_query = for_key.new_zeros(len(for_key), width, scores.shape[1])
    by_slots = [scores.keys, across(key[0]), with_ones(value[0])]
    by_slots += [evenly(for_key), evenly(for_value)]
    by_rows = [scores.queries, narrow(scores.queries, width), slope, narrow(slope, width)]
    for tile in each(by_slots, [*by_rows, evenly(for_query, dim=2)]):
        keys, keys_across, values, sum_key, sum_value, *rows = tile
        queries, narrow_queries, onward, narrow_onward, sum_query = rows
        weights = scores.exponential(keys, queries)
        sum_value += plain_products(weights, narrow_onward)
        weights *= plain_products(values, onward.mT)
        sum_key += plain_products(weights, narrow_queries)
        sum_query += plain_products(keys_across, weights)
        del weights
    for_query *= scores.scale
    for_key *= scores.scale / scores.stretch
    return unstacked(for_query.mT, query), for_key[None], for_value[None]


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
        self, a: Float[Tensor, "G a C"], b: Float[Tensor, "G b C"]
    ) -> Float[Tensor, "G a b"]:
        """``exp(score - norm)`` of a tile: queries and keys, or keys and queries."""
        if self.factor == 1:
            return plain_products(a, b.mT).exp2_()
        shape = (*a.shape[:2], b.shape[1])
        scores = self.room[: math.prod(shape)].view(shape)
        torch.baddbmm(scores, a, b.mT, beta=0, alpha=self.factor, out=scores)
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


def across(x: Float[Tensor, "G N E"]) -> list[Float[Tensor, "G E _"]]:
    """Columns as rows."""
    return [tile.mT.contiguous() for tile in evenly(x)]


def narrow(found: list[Float[Tensor, "G _ C"]], width: int) -> list[Float[Tensor, "G _ E"]]:
    """Without the columns of ``shifted``."""
    return [tile[..., :width].contiguous() for tile in found]


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
