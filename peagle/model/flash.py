"""Attention of both streams on the CPU: flash-kernel calls that are merged by their log-sum-exp.

A softmax can be taken over disjoint parts of its keys and put together exactly, given each part's
log-sum-exp; in the backward pass a part takes the *merged* output and log-sum-exp (as in ring
attention). So the slots that a block of rows sees in full need no mask, no mask of [rows, prefix]
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

from peagle.cod.rollouts import Rows
from peagle.cod.visibility import visible

LEAF_ROWS = 256  # rows per masked call: few enough to waste little, enough for the kernel
LEAF_SLOTS = 256  # slots that a leaf takes along rather than leave them to a call of their own
LONG = 1024  # slots from which on bf16 is faster, for a CPU without tiles for its products
MATRIX_TILES = torch.cpu._is_amx_tile_supported()

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class Part(NamedTuple):
    """Rows and depth-0 slots: one kernel call.

    Without a mask every row sees every slot. With one, the rows are a leaf: they see these slots
    and each other where it is 0, not where it is -inf.
    """

    rows: slice
    slots: slice
    mask: Float[Tensor, "q k"] | None  # over [slots | rows]

    def bias(self, dtype: torch.dtype) -> Float[Tensor, "q k"] | None:
        """What is added to the scores."""
        return None if self.mask is None else self.mask.to(dtype)


class Plan(NamedTuple):
    """How the rows of a segment (depth >= 1, sorted) see the prefix and their own rollout."""

    leaves: tuple[Part, ...]  # every row is in one of them
    full: tuple[Part, ...]


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
    return Plan(leaves, tuple(part for part in found if part.mask is None))


class _Layout(NamedTuple):
    rows: Rows
    document: Int[Tensor, " S"]
    rollouts: list[int]  # where each rollout begins
    anchor: list[int]

    def parts(self, start: int, stop: int, begin: int) -> Iterator[Part]:
        """What rows of one document see from slot ``begin`` on.

        All of them see what lies before the first anchor; for the rest, each half by itself.
        """
        end = self.anchor[start]
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


def flash_causal_attention(
    query: Float[Tensor, "S A E"],
    key: Float[Tensor, "S G E"],
    value: Float[Tensor, "S G E"],
    *,
    document_lengths: list[int],
) -> Float[Tensor, "S A E"]:
    """Every slot sees the slots of its document up to itself; computed in the query's precision,
    returned in that of ``value``."""
    cuts = [0, *accumulate(document_lengths)]
    return _CausalAttention.apply(query, key, value, [slice(a, b) for a, b in pairwise(cuts)])


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, documents):
        total = torch.empty_like(query, dtype=value.dtype)
        norm = torch.empty(heads_first(query, key).shape[:-1], dtype=precise(query))
        out, queries = heads_first(total, key), heads_first(query, key)
        pairs = [shared(x, query) for x in (key, value)]
        for slots in documents:
            here = (slice(None), slice(None), slots)
            out[here], norm[here] = flash(queries[here], *(x[here] for x in pairs), is_causal=True)
        ctx.documents = documents
        ctx.save_for_backward(query, key, value, total, norm)
        return total

    @staticmethod
    def backward(ctx, grad):
        query, key, value, total, norm = ctx.saved_tensors
        grads = [torch.empty_like(x, dtype=query.dtype) for x in (query, key, value)]
        for_query = heads_first(grads[0], key)
        onward, out = (heads_first(x.to(query.dtype), key) for x in (grad, total))
        queries, pairs = heads_first(query, key), [shared(x, query) for x in (key, value)]
        for slots in ctx.documents:
            here = (slice(None), slice(None), slots)
            for_query[here], *for_pairs = flash_backward(
                *(x[here] for x in (onward, queries, *pairs, out, norm)), 0.0, True
            )
            for grad_pair, part in zip(grads[1:], for_pairs, strict=True):
                grad_pair[slots] = part.sum(0).transpose(0, 1)
        return *(g.to(x.dtype) for g, x in zip(grads, (query, key, value), strict=True)), None


def flash_rollout_attention(
    query: Float[Tensor, "M A E"],
    key: Float[Tensor, "M G E"],
    value: Float[Tensor, "M G E"],
    prefix_key: Float[Tensor, "S G E"],
    prefix_value: Float[Tensor, "S G E"],
    *,
    plan: Plan,
) -> Float[Tensor, "M A E"]:
    """Every row sees its document's depth-0 slots up to its anchor, and its rollout so far.

    Computed in the query's precision, returned in that of ``value``.
    """
    return _RolloutAttention.apply(query, key, value, prefix_key, prefix_value, plan)


class _RolloutAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, plan):
        queries, own, prefix = in_parts(query, key, value, prefix_key, prefix_value)
        total = torch.empty_like(query, dtype=precise(query))
        out = heads_first(total, key)
        norm = total.new_empty(out.shape[:-1])
        for part in plan.leaves:
            here = (slice(None), slice(None), part.rows)
            out[here], norm[here] = flash(
                queries[here], *leaf_pairs(part, own, prefix), attn_mask=part.bias(norm.dtype)
            )
        for part in plan.full:
            here = (slice(None), slice(None), part.rows)
            seen = (x[:, :, part.slots] for x in prefix)
            merge(out[here], norm[here], *flash(queries[here], *seen))
        total = total.to(value.dtype)
        ctx.plan = plan
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, total, norm)
        return total

    @staticmethod
    def backward(ctx, grad):
        *inputs, total, norm = ctx.saved_tensors
        key = inputs[1]
        queries, own, prefix = in_parts(*inputs)
        onward, out = (heads_first(x.to(inputs[0].dtype), key) for x in (grad, total))
        grads = [torch.zeros_like(x, dtype=precise(x)) for x in inputs]
        for_query = heads_first(grads[0], key)
        for part in (*ctx.plan.leaves, *ctx.plan.full):
            here = (slice(None), slice(None), part.rows)
            if part.mask is None:
                pairs = [x[:, :, part.slots] for x in prefix]
            else:
                pairs = leaf_pairs(part, own, prefix)
            part_query, *for_pairs = flash_backward(
                *(x[here] for x in (onward, queries)),
                *pairs,
                *(x[here] for x in (out, norm)),
                0.0,
                False,
                attn_mask=part.bias(norm.dtype),
            )
            for_query[here] += part_query
            count = part.slots.stop - part.slots.start
            for part_pair, for_own, for_prefix in zip(
                for_pairs, grads[1:3], grads[3:], strict=True
            ):
                summed = part_pair.sum(0).transpose(0, 1)
                for_prefix[part.slots] += summed[:count]
                if part.mask is not None:
                    for_own[part.rows] += summed[count:]
        return *(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True)), None


def in_parts(query, key, value, prefix_key, prefix_value):
    """Queries, own pairs and prefix pairs in the kernel's order of dimensions and precision."""
    own = [shared(x, query) for x in (key, value)]
    return heads_first(query, key), own, [shared(x, query) for x in (prefix_key, prefix_value)]


def leaf_pairs(part: Part, own: list[Tensor], prefix: list[Tensor]) -> list[Tensor]:
    """Keys and values of a leaf: slots, then rows."""
    return [
        torch.cat([before[:1, :, part.slots], mine[:1, :, part.rows]], 2).expand(
            len(mine), -1, -1, -1
        )
        for before, mine in zip(prefix, own, strict=True)
    ]


def merge(
    total: Float[Tensor, "R G T E"],
    norm: Float[Tensor, "R G T"],
    out: Float[Tensor, "R G T E"],
    lse: Float[Tensor, "R G T"],
) -> None:
    """Add a part to ``total`` and its log-sum-exp to ``norm``, in place."""
    total.lerp_(out.to(total.dtype), torch.sigmoid(lse - norm)[..., None])
    norm.copy_(torch.logaddexp(norm, lse))


def heads_first(x: Float[Tensor, "T A E"], key: Float[Tensor, "K G E"]) -> Float[Tensor, "R G T E"]:
    """Heads in the kernel's order; those that share keys and values are its batch."""
    return x.unflatten(1, (key.shape[1], -1)).permute(2, 1, 0, 3)


def shared(x: Float[Tensor, "T G E"], query: Float[Tensor, "M A E"]) -> Float[Tensor, "R G T E"]:
    """Keys or values in the query's precision, for every head of their group without a copy."""
    return x.to(query.dtype).transpose(0, 1).expand(query.shape[1] // x.shape[1], -1, -1, -1)


def precise(x: Float[Tensor, "..."]) -> torch.dtype:
    """What sums are kept in."""
    return torch.promote_types(x.dtype, torch.float32)


def fast_dtype(dtype: torch.dtype, longest: int) -> torch.dtype:
    """Precision in which the kernel is fastest for documents of up to ``longest`` slots."""
    if MATRIX_TILES or longest >= LONG:
        return dtype
    return torch.promote_types(dtype, torch.float32)
