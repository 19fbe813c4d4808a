"""Attention of both streams on the CPU: parts that are merged by their log-sum-exp.

``attention_plan.py`` says what each part sees. The flash kernel does what is masked, ``seen.py``
the rest. In the backward pass a part takes the *merged* output and log-sum-exp (as in ring
attention).
"""

import torch
from jaxtyping import Float
from torch import Tensor

import peagle.kernels.cpu.flash_kernel as kernel
from peagle.kernels.cpu.attention_tiles import Part, Plan, plan_causal
from peagle.kernels.cpu.gemm_attention import precise
from peagle.kernels.cpu.shared_attention import attend, attend_backward
from peagle.kernels.grad_accumulation import held_of

CAUSAL_LEAF = 256  # slots of depth 0 that the kernel takes at a time where products do the rest


def flash_causal_attention(
    query: Float[Tensor, "S A E"],
    key: Float[Tensor, "S G E"],
    value: Float[Tensor, "S G E"],
    *,
    document_lengths: list[int],
) -> Float[Tensor, "S A E"]:
    """Every slot sees the slots of its document up to itself; returned in ``value``'s precision."""
    plan = plan_causal(document_lengths, CAUSAL_LEAF if kernel.by_products(query) else None)
    none = (x.detach()[:0] for x in (key, value))
    return merged_attention(query, *none, key, value, plan, False)


def flash_rollout_attention(
    query: Float[Tensor, "M A E"],
    key: Float[Tensor, "M G E"],
    value: Float[Tensor, "M G E"],
    prefix_key: Float[Tensor, "S G E"],
    prefix_value: Float[Tensor, "S G E"],
    *,
    plan: Plan,
    alike: bool = False,
) -> Float[Tensor, "M A E"]:
    """Every row sees its document's depth-0 slots up to its anchor, and its rollout so far;
    returned in ``value``'s precision.

    ``alike``: rows that stand at the same slot have the same query.
    """
    return merged_attention(query, key, value, prefix_key, prefix_value, plan, alike)


def merged_attention(query: Float[Tensor, "T A E"], *others) -> Float[Tensor, "T A E"]:
    """In the precision of its inputs: autocast would round products of float32."""
    with torch.autocast(query.device.type, enabled=False):
        return _Attention.apply(query, *others)


class _Attention(torch.autograd.Function):
    """Leaves first, since every row is in one; then what all rows of a part see."""

    @staticmethod
    def forward(ctx, query, key, value, prefix_key, prefix_value, plan, alike):
        queries, own, prefix = in_parts(query, key, value, prefix_key, prefix_value)
        total = torch.empty_like(query, dtype=precise(query))
        out = heads_first(total, key)
        norm = total.new_empty(out.shape[:-1])
        for part in plan.leaves:
            here = (slice(None), slice(None), part.rows)
            pairs, bias = leaf_pairs(part, own, prefix), part.bias(norm.dtype)
            out[here], norm[here] = kernel.attend(
                queries[here], *pairs, mask=bias, causal=bias is None
            )
        for part in plan.full:
            here = (slice(None), slice(None), part.rows)
            pairs = [x[:, :, part.slots] for x in prefix]
            places = part.places if alike else None
            merge(out[here], norm[here], *attend(queries[here], *pairs, norm[here], places))
        total = total.to(value.dtype)
        ctx.plan, ctx.alike = plan, alike
        ctx.held = [held_of(x) for x in (prefix_key, prefix_value)]
        ctx.save_for_backward(query, key, value, prefix_key, prefix_value, total, norm)
        return total

    @staticmethod
    def backward(ctx, grad):
        *inputs, total, norm = ctx.saved_tensors
        key = inputs[1]
        queries, own, prefix = in_parts(*inputs)
        onward, out = (heads_first(x.to(inputs[0].dtype), key) for x in (grad, total))
        # A piece sees few of all slots: where their gradients are held, they are added there.
        held = [None, None, None, *ctx.held]
        grads = [
            torch.zeros_like(x, dtype=precise(x)) if known is None else known.grad
            for x, known in zip(inputs, held, strict=True)
        ]
        for_query = heads_first(grads[0], key)

        def given(part: Part, pairs: list[Tensor]) -> list[Tensor]:
            here = (slice(None), slice(None), part.rows)
            return [onward[here], queries[here], *pairs, out[here], norm[here]]

        for part in ctx.plan.leaves:
            some, bias = given(part, leaf_pairs(part, own, prefix)), part.bias(norm.dtype)
            found = kernel.attend_backward(*some, mask=bias, causal=bias is None)
            add_found(part, found, for_query, grads)
        for part in ctx.plan.full:
            places = part.places if ctx.alike else None
            found = attend_backward(*given(part, [x[:, :, part.slots] for x in prefix]), places)
            add_found(part, found, for_query, grads)
        found = (
            grad.to(x.dtype) if known is None else None
            for grad, x, known in zip(grads, inputs, held, strict=True)
        )
        return *found, None, None


def in_parts(query, key, value, prefix_key, prefix_value):
    """Queries, own pairs and prefix pairs in the kernel's order of dimensions and precision."""
    own = [shared(x, query) for x in (key, value)]
    return heads_first(query, key), own, [shared(x, query) for x in (prefix_key, prefix_value)]


def add_found(
    part: Part, found: tuple[Tensor, ...], for_query: Tensor, grads: list[Tensor]
) -> None:
    """Gradients of a part, to those of query, own pairs and prefix pairs."""
    for_query[:, :, part.rows] += found[0]
    count = part.slots.stop - part.slots.start
    for pair, mine, before in zip(found[1:], grads[1:3], grads[3:], strict=True):
        summed = (pair.sum(0) if len(pair) > 1 else pair[0]).transpose(0, 1)
        before[part.slots] += summed[:count]
        if part.mask is not None:
            mine[part.rows] += summed[count:]


def leaf_pairs(part: Part, own: list[Tensor], prefix: list[Tensor]) -> list[Tensor]:
    """Keys and values of a leaf: slots, then rows if it has a mask."""
    if part.mask is None:
        return [before[:, :, part.slots] for before in prefix]
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
