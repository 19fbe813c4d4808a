"""Attention of rows to slots that all of them see, as matrix products.

torch's flash kernel searches each row's largest score before it may take an exponential, and its
own products are slow in bf16. Here the rows come with the log-sum-exp (lse) of what they have
attended to already (their diagonal tile first, ``attention_tiles.py``). So ``exp(score - lse)``
needs no maximum: it is what a slot weighs beside what was seen before. The product itself subtracts
``lse``, by columns of its own. In bf16 the difference is what is rounded, and the exponential (of
base two: the faster one) is the only pass over it.

A step of 4,096 slots on an Intel Xeon with AMX: 8.5 s for 12.8 s with the kernel in bf16
(docs/log.md, 2026-11-30).
"""

import math
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from peagle.kernels.precision import at_least_float32

TILE = 1280  # rows and slots, at most, whose weights exist at a time: whole units
COLUMNS = {torch.bfloat16: 3}  # that add up to a float32
UNIT = 128  # tiles are multiples of it: oneDNN makes code for each size, and keeps that of few


def attend_gemm(
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "#R G S E"],
    value: Float[Tensor, "#R G S E"],
    lse: Float[Tensor, "R G T"],
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "R G T"]]:
    """Values summed by ``exp(score - lse)``, and the sum of these weights.

    Sums over tiles are kept in float32 or better; each tile is rounded to the query's precision.
    Either is infinite where a score exceeds ``lse`` by more than that can say.
    """
    scores = _Scores(stacked(query), key[0], stacked(lse))
    total = query.new_zeros(*scores.shape, query.shape[3], dtype=at_least_float32(query.dtype))
    weight = total.new_zeros(scores.shape)
    by_slots = zip(scores.keys, tiles(value[0]), strict=True)
    by_rows = zip(scores.queries, evenly(total), evenly(weight), strict=True)
    for (keys, values), (queries, sums, counts) in product(by_slots, by_rows):
        weights = scores.exponential(queries, keys)
        sums += weights @ values
        counts += weights.sum(-1)
    return unstacked(total, query), unstacked(weight, query)


def attend_gemm_backward(
    grad: Float[Tensor, "R G T E"],
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "#R G S E"],
    value: Float[Tensor, "#R G S E"],
    out: Float[Tensor, "R G T E"],
    lse: Float[Tensor, "R G T"],
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "1 G S E"], Float[Tensor, "1 G S E"]]:
    """Gradients of query, key and value, the latter two of all heads together.

    ``out`` and ``lse`` are of all that the rows see.
    """
    scores, width = _Scores(stacked(query), key[0], stacked(lse)), query.shape[3]
    delta = (grad.to(lse.dtype) * out).sum(-1)
    slope = with_columns(stacked(grad), -stacked(delta))
    for_key, for_value = query.new_zeros(2, *key.shape[1:], dtype=at_least_float32(query.dtype))
    for_query = for_key.new_zeros(len(for_key), width, scores.shape[1])
    columns = [tile.mT.contiguous() for tile in evenly(key[0])]
    by_slots = [scores.keys, columns, with_ones(value[0]), evenly(for_key), evenly(for_value)]
    by_rows = [scores.queries, narrow(scores.queries, width), slope, narrow(slope, width)]
    by_rows.append(evenly(for_query, dim=2))
    for slots, rows in product(zip(*by_slots, strict=True), zip(*by_rows, strict=True)):
        keys, keys_across, values, sum_key, sum_value = slots
        queries, narrow_queries, onward, narrow_onward, sum_query = rows
        weights = scores.exponential(keys, queries)
        sum_value += weights @ narrow_onward
        weights *= values @ onward.mT
        sum_key += weights @ narrow_queries
        sum_query += keys_across @ weights
    for_query *= scores.scale
    for_key *= scores.scale
    return unstacked(for_query.mT, query), for_key[None], for_value[None]


class _Scores:
    """Tiles of queries and keys with the columns that subtract ``lse``."""

    def __init__(
        self,
        query: Float[Tensor, "G N E"],
        key: Float[Tensor, "G S E"],
        lse: Float[Tensor, "G N"],
    ):
        self.scale = query.shape[2] ** -0.5
        self.queries = with_columns(query, lse / -self.scale)
        self.keys = with_ones(key)
        self.shape = (len(query), sum(tile.shape[1] for tile in self.queries))
        largest = max(tile.shape[1] for tile in self.queries), max(t.shape[1] for t in self.keys)
        self.room = query.new_empty(len(query) * math.prod(largest))

    def exponential(
        self, a: Float[Tensor, "G a C"], b: Float[Tensor, "G b C"]
    ) -> Float[Tensor, "G a b"]:
        """``exp(score - lse)`` of a tile: queries and keys, or keys and queries. In memory that
        the next tile is given again."""
        shape = (*a.shape[:2], b.shape[1])
        scores = self.room[: math.prod(shape)].view(shape)
        torch.baddbmm(scores, a, b.mT, beta=0, alpha=self.scale / math.log(2), out=scores)
        return scores.exp2_()


def tiles(x: Float[Tensor, "G N E"]) -> list[Float[Tensor, "G _ E"]]:
    """Each in one piece of memory, as the products want it."""
    return [tile.contiguous() for tile in evenly(x)]


def narrow(found: list[Float[Tensor, "G _ C"]], width: int) -> list[Float[Tensor, "G _ E"]]:
    """Without the columns of ``with_columns``."""
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
    """Each head by itself again, without the rows that ``with_columns`` has added."""
    heads, _, rows, _ = like.shape
    return x[:, : heads * rows].unflatten(1, (heads, rows)).transpose(0, 1)


def with_columns(
    x: Float[Tensor, "G N E"], addend: Float[Tensor, "G N"]
) -> list[Float[Tensor, "G _ C"]]:
    """Tiles of ``x`` with columns that add ``addend`` to the product; zero rows fill up a unit."""
    rows = torch.cat([x, split(addend, x.dtype)], 2)
    return tiles(F.pad(rows, (0, 0, 0, -rows.shape[1] % UNIT)))


def split(x: Float[Tensor, "..."], dtype: torch.dtype) -> Float[Tensor, "... C"]:
    """Parts in ``dtype`` that add up to ``x``."""
    parts = []
    for _ in range(COLUMNS.get(dtype, 1)):
        parts.append(x.to(dtype))
        x = x - parts[-1].to(x.dtype)
    return torch.stack(parts, -1)


def with_ones(x: Float[Tensor, "G S E"]) -> list[Float[Tensor, "G _ C"]]:
    """Tiles of ``x`` with what takes up the columns of ``with_columns``."""
    ones = x.new_ones(*x.shape[:2], COLUMNS.get(x.dtype, 1))
    return tiles(torch.cat([x, ones], 2))
