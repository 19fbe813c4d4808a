"""Attention of rollouts on the CPU: flash-kernel calls that are merged by their log-sum-exp.

A softmax can be taken over disjoint parts of its keys and put together exactly, given each part's
log-sum-exp; in the backward pass a part takes the *merged* output and log-sum-exp (as in ring
attention). So the slots that a block of rows sees in full need no mask, no mask of [rows, prefix]
ever exists, and hardly anything invisible is computed: only short leaves are masked, and the few
rows of the own rollout are a band beside the diagonal.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peagle.cod.rollouts import Rows
from peagle.cod.visibility import visible

LEAF_ROWS = 256  # rows per masked part: few enough to waste little, enough for the kernel
BAND_ROWS = 512  # rows of the band at a time: their products stay in the cache

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """Rows of a segment and depth-0 slots that they see: one kernel call."""

    rows: slice
    prefix: slice
    mask: Float[Tensor, "q k"] | None  # added to the scores; None: every row sees every slot

    def bias(self, query: Float[Tensor, "M A E"]) -> Float[Tensor, "q k"] | None:
        return None if self.mask is None else self.mask.to(precise(query))


class Plan(NamedTuple):
    """How the rows of a segment (depth >= 1, sorted) see the prefix and their own rollout."""

    parts: tuple[Part, ...]
    depth: Int[Tensor, " M"]


def plan_flash(rows: Rows, document: Int[Tensor, " S"]) -> Plan:
    """Cut what the rows see of depth 0 into parts, document by document."""
    rollouts = torch.nonzero(rows.depth == 1).flatten()
    number = document[rows.anchor[rollouts]]
    first = torch.ones_like(number, dtype=torch.bool)
    first[1:] = number[1:] != number[:-1]
    cuts = [*rollouts[first].tolist(), len(rows.anchor)]
    begins = torch.searchsorted(document, number[first]).tolist()
    layout = _Layout(rows, rollouts.tolist(), rows.anchor.tolist())
    parts: list[Part] = []
    for begin, (start, stop) in zip(begins, pairwise(cuts), strict=True):
        parts += layout.full(start, stop, begin, layout.anchor[start])
        parts += layout.below(start, stop, layout.anchor[start])
    return Plan(tuple(parts), rows.depth)


class _Layout(NamedTuple):
    rows: Rows
    rollouts: list[int]  # where each rollout begins
    anchor: list[int]

    def full(self, start: int, stop: int, begin: int, end: int) -> Iterator[Part]:
        if begin < end:
            yield Part(slice(start, stop), slice(begin, end), None)

    def below(self, start: int, stop: int, begin: int) -> Iterator[Part]:
        """Parts of the slots from ``begin`` on, none of which lies after the first anchor.

        The later half of the rows sees in full what lies before its first anchor, and so on.
        """
        middle = self.rollouts[bisect_left(self.rollouts, (start + stop) // 2)]
        if stop - start <= LEAF_ROWS or not start < middle < stop:
            yield self.leaf(start, stop, begin)
            return
        yield from self.below(start, middle, begin)
        yield from self.full(middle, stop, begin, self.anchor[middle])
        yield from self.below(middle, stop, self.anchor[middle])

    def leaf(self, start: int, stop: int, begin: int) -> Part:
        slots = torch.arange(begin, self.anchor[stop - 1] + 1)
        own = Rows(self.rows.anchor[start:stop], self.rows.depth[start:stop])
        same = torch.zeros_like(slots)  # the slots lie in one document
        seen = visible(own, Rows(slots, same), torch.zeros(int(slots[-1]) + 1, dtype=torch.long))
        mask = torch.zeros(seen.shape).masked_fill_(~seen, -math.inf)
        return Part(slice(start, stop), slice(begin, begin + len(slots)), mask)


def flash_rollout_attention(
    query: Float[Tensor, "M A E"],
    key: Float[Tensor, "M G E"],
    value: Float[Tensor, "M G E"],
    prefix_key: Float[Tensor, "S G E"],
    prefix_value: Float[Tensor, "S G E"],
    *,
    plan: Plan,
) -> Float[Tensor, "M A E"]:
    """Every row sees its document's depth-0 slots up to its anchor, and its rollout so far."""
    return _RolloutAttention.apply(query, key, value, prefix_key, prefix_value, plan)


class _RolloutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, plan):
        groups = key.shape[1]
        total, norm = band(query, key, value, plan.depth)
        for part in plan.parts:
            out, lse = flash(
                spread(query[part.rows], groups),
                shared(prefix_key[part.prefix], query),
                shared(prefix_value[part.prefix], query),
                attn_mask=part.bias(query),
            )
            merge(total[part.rows], norm[part.rows], gathered(out), lse.permute(2, 1, 0))
        total = total.flatten(1, 2).to(query.dtype)
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, total, norm)
        return total

    @staticmethod
    def backward(ctx, grad):
        query, key, value, prefix_key, prefix_value, total, norm = ctx.saved_tensors
        groups = key.shape[1]
        grad_query, grad_key, grad_value = band_backward(
            grad, query, key, value, total, norm, ctx.plan.depth
        )
        grad_prefix_key = torch.zeros_like(prefix_key)
        grad_prefix_value = torch.zeros_like(prefix_value)
        for part in ctx.plan.parts:
            for_query, for_key, for_value = flash_backward(
                spread(grad[part.rows], groups),
                spread(query[part.rows], groups),
                shared(prefix_key[part.prefix], query),
                shared(prefix_value[part.prefix], query),
                spread(total[part.rows], groups),
                norm[part.rows].permute(2, 1, 0),
                0.0,
                False,
                attn_mask=part.bias(query),
            )
            grad_query[part.rows] += gathered(for_query)
            grad_prefix_key[part.prefix] += for_key.sum(0).transpose(0, 1)
            grad_prefix_value[part.prefix] += for_value.sum(0).transpose(0, 1)
        return (
            grad_query.flatten(1, 2).to(query.dtype),
            grad_key.to(key.dtype),
            grad_value.to(value.dtype),
            grad_prefix_key,
            grad_prefix_value,
            None,
        )


def spread(x: Float[Tensor, "T A E"], groups: int) -> Float[Tensor, "R G T E"]:
    """Heads in the kernel's order; those that share keys and values are its batch."""
    return x.unflatten(1, (groups, -1)).permute(2, 1, 0, 3)


def gathered(x: Float[Tensor, "R G T E"]) -> Float[Tensor, "T G R E"]:
    return x.permute(2, 1, 0, 3)


def shared(x: Float[Tensor, "T G E"], query: Float[Tensor, "M A E"]) -> Float[Tensor, "R G T E"]:
    """Keys or values, seen by every query head of their group without a copy."""
    return x.transpose(0, 1).expand(query.shape[1] // x.shape[1], -1, -1, -1)


def merge(
    total: Float[Tensor, "T G R E"],
    norm: Float[Tensor, "T G R"],
    out: Float[Tensor, "T G R E"],
    lse: Float[Tensor, "T G R"],
) -> None:
    """Add a part to ``total`` and its log-sum-exp to ``norm``, in place."""
    merged = torch.logaddexp(norm, lse)
    total *= torch.exp(norm - merged)[..., None]
    total += out * torch.exp(lse - merged)[..., None]
    norm.copy_(merged)


def band(
    query: Float[Tensor, "M A E"],
    key: Float[Tensor, "M G E"],
    value: Float[Tensor, "M G E"],
    depth: Int[Tensor, " M"],
) -> tuple[Float[Tensor, "M G R E"], Float[Tensor, "M G R"]]:
    """Attention to the own rollout so far, and its log-sum-exp; both in float32 at least."""
    groups, scale = key.shape[1], query.shape[2] ** -0.5
    total = torch.zeros_like(query, dtype=precise(query)).unflatten(1, (groups, -1))
    norm = total.new_empty(total.shape[:-1])
    for rows, queries in band_chunks(query, groups):
        weights = band_scores(queries, key, depth[rows], rows) * scale
        highest = weights.amax(0)
        weights = weights.sub_(highest).exp_()
        norm[rows] = highest + weights.sum(0).log_()
        weights /= weights.sum(0)
        for back, (here, there) in enumerate(shifts(rows, len(weights))):
            seen = value[there][:, :, None]
            total[here] += weights[back, here.start - rows.start :][..., None] * seen
    return total, norm


def precise(x: Float[Tensor, "..."]) -> torch.dtype:
    """What sums are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def band_chunks(
    x: Float[Tensor, "M A E"], groups: int
) -> Iterator[tuple[slice, Float[Tensor, "T G R E"]]]:
    for start in range(0, len(x), BAND_ROWS):
        rows = slice(start, min(start + BAND_ROWS, len(x)))
        yield rows, x[rows].to(precise(x)).unflatten(1, (groups, -1))


def shifts(rows: slice, count: int) -> Iterator[tuple[slice, slice]]:
    """For 0, 1, ... rows back: the rows that have such a row before them, and that row."""
    for back in range(count):
        start = max(rows.start, back)
        yield slice(start, rows.stop), slice(start - back, rows.stop - back)


def band_scores(
    query: Float[Tensor, "T G R E"],
    key: Float[Tensor, "M G E"],
    depth: Int[Tensor, " T"],
    rows: slice,
) -> Float[Tensor, "W T G R"]:
    """Products of each row with itself and the rows before it; -inf beyond its rollout."""
    count = int(depth.max())
    scores = query.new_full((count, *query.shape[:3]), -math.inf)
    for back, (here, there) in enumerate(shifts(rows, count)):
        first = here.start - rows.start
        product = query[first:] * key[there][:, :, None]
        beyond = depth[first:, None, None] <= back
        scores[back, first:] = product.sum(-1).masked_fill_(beyond, -math.inf)
    return scores


def band_backward(
    grad: Float[Tensor, "M A E"],
    query: Float[Tensor, "M A E"],
    key: Float[Tensor, "M G E"],
    value: Float[Tensor, "M G E"],
    total: Float[Tensor, "M A E"],
    norm: Float[Tensor, "M G R"],
    depth: Int[Tensor, " M"],
) -> tuple[Float[Tensor, "M G R E"], Float[Tensor, "M G E"], Float[Tensor, "M G E"]]:
    """Gradients of the own-rollout part, given the output and log-sum-exp over all keys."""
    groups, scale = key.shape[1], query.shape[2] ** -0.5
    grad_query = torch.zeros_like(query, dtype=precise(query)).unflatten(1, (groups, -1))
    grad_key, grad_value = (torch.zeros_like(key, dtype=precise(key)) for _ in range(2))
    for (rows, queries), (_, grads) in zip(
        band_chunks(query, groups), band_chunks(grad, groups), strict=True
    ):
        weights = torch.exp(band_scores(queries, key, depth[rows], rows) * scale - norm[rows])
        mean = (grads * total[rows].unflatten(1, (groups, -1))).sum(-1)
        for back, (here, there) in enumerate(shifts(rows, len(weights))):
            first = here.start - rows.start
            weight, onward = weights[back, first:], grads[first:]
            slope = (onward * value[there][:, :, None]).sum(-1)
            slope = (slope - mean[first:]).mul_(weight).mul_(scale)
            grad_query[here] += slope[..., None] * key[there][:, :, None]
            grad_key[there] += (slope[..., None] * queries[first:]).sum(2)
            grad_value[there] += (weight[..., None] * onward).sum(2)
    return grad_query, grad_key, grad_value
