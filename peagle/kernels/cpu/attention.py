"""Attention of NTP and MTP on the CPU: tiles that are merged by their log-sum-exp (lse).

One rule for every processor: torch's flash kernel, in float32, computes what is masked, and all of
it where queries are float32. Where queries are bf16 (``Cpu.attention_dtype``), matrix products
compute the tiles without a mask (``gemm_attention.py``): in bf16 the kernel's backward pass takes
twice as long as in float32, on Intel's processors with AMX too (docs/log.md, 2026-11-30). In the
backward pass a tile takes the *merged* output and lse, as in ring attention.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from peagle.kernels.cpu.attention_tiles import Tile, Tiling, tile_documents
from peagle.kernels.cpu.gemm_attention import (
    attend_gemm,
    attend_gemm_backward,
    stacked,
    unstacked,
)
from peagle.kernels.device import without_autocast
from peagle.kernels.precision import at_least_float32

MANY = 768  # rows from which on the kernel takes 256 at a time by itself
CAUSAL_SLOTS = 256  # of NTP that the kernel takes at a time where products do the rest
MOST = 2e4  # sum of weights: above it bf16 rounds by 3 %, and the kernel takes over
LEAST = 1e-30  # a sum of weights that adds nothing and can be divided by

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward

Triple = tuple[Tensor, Tensor, Tensor]


def ntp_attention(
    query: Float[Tensor, "S A E"],
    key: Float[Tensor, "S G E"],
    value: Float[Tensor, "S G E"],
    *,
    document_lengths: list[int],
) -> Float[Tensor, "S A E"]:
    """Every slot sees the slots of its document up to itself; returned in ``value``'s precision."""
    tiling = tile_documents(document_lengths, CAUSAL_SLOTS if by_gemm(query) else None)
    no_rows = (x.detach()[:0] for x in (key, value))
    return tiled_attention(query, *no_rows, key, value, tiling, [None, None])


def mtp_attention(
    query: Float[Tensor, "M A E"],
    key: Float[Tensor, "M G E"],
    value: Float[Tensor, "M G E"],
    ntp_key: Float[Tensor, "S G E"],
    ntp_value: Float[Tensor, "S G E"],
    tiling: Tiling,
    main_grads: Sequence[Tensor | None],
) -> Float[Tensor, "M A E"]:
    """Every row sees its document's NTP slots up to its anchor, and its rollout so far; returned
    in ``value``'s precision.

    ``main_grads``: of ``ntp_key`` and ``ntp_value``. A piece sees few of all slots, so their
    gradients are added right there.
    """
    return tiled_attention(query, key, value, ntp_key, ntp_value, tiling, main_grads)


def tiled_attention(query: Float[Tensor, "T A E"], *others) -> Float[Tensor, "T A E"]:
    """In the precision of its inputs: autocast would round products of float32."""
    with without_autocast(query.device):
        return _TiledAttention.apply(query, *others)


class _TiledAttention(torch.autograd.Function):
    """Diagonal tiles first, since every row is in one; then what all rows of a tile see."""

    @staticmethod
    def forward(ctx, query, key, value, ntp_key, ntp_value, tiling, main_grads):
        queries, own, slots = by_group(query, key, value, ntp_key, ntp_value)
        total = torch.empty_like(query, dtype=at_least_float32(query.dtype))
        out = heads_first(total, key)
        lse = total.new_zeros(out.shape[:-1])
        for tile in tiling.diagonal:
            here = (slice(None), slice(None), tile.rows)
            pairs = diagonal_pairs(tile, own, slots)
            out[here], lse[here] = attend(queries[here], *pairs, tile.mask, causal=True)
        for tile in tiling.full:
            here = (slice(None), slice(None), tile.rows)
            pairs = [x[:, :, tile.slots] for x in slots]
            merge(out[here], lse[here], *attend_full(queries[here], *pairs, lse[here]))
        total = total.to(value.dtype)
        ctx.tiling, ctx.main_grads = tiling, [None, None, None, *main_grads]
        ctx.save_for_backward(query, key, value, ntp_key, ntp_value, total, lse)
        return total

    @staticmethod
    def backward(ctx, grad):
        *inputs, total, lse = ctx.saved_tensors
        key = inputs[1]
        queries, own, slots = by_group(*inputs)
        onward, out = (heads_first(x.to(inputs[0].dtype), key) for x in (grad, total))
        sums = [
            torch.zeros_like(x, dtype=at_least_float32(x.dtype)) if main is None else main
            for x, main in zip(inputs, ctx.main_grads, strict=True)
        ]
        for_query = heads_first(sums[0], key)

        def with_pairs(tile: Tile, pairs: list[Tensor]) -> list[Tensor]:
            here = (slice(None), slice(None), tile.rows)
            return [onward[here], queries[here], *pairs, out[here], lse[here]]

        for tile in ctx.tiling.diagonal:
            inputs_ = with_pairs(tile, diagonal_pairs(tile, own, slots))
            add_gradients(tile, attend_backward(*inputs_, tile.mask, causal=True), for_query, sums)
        backward = attend_gemm_backward if by_gemm(queries) else attend_backward
        for tile in ctx.tiling.full:
            inputs_ = with_pairs(tile, [x[:, :, tile.slots] for x in slots])
            add_gradients(tile, backward(*inputs_), for_query, sums)
        returned = (
            total.to(x.dtype) if main is None else None
            for total, x, main in zip(sums, inputs, ctx.main_grads, strict=True)
        )
        return *returned, None, None


def by_gemm(query: Float[Tensor, "..."]) -> bool:
    """Whether matrix products compute what has no mask."""
    return query.dtype == torch.bfloat16


def attend_full(
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "R G S E"],
    value: Float[Tensor, "R G S E"],
    lse: Float[Tensor, "R G T"],
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "R G T"]]:
    """What the rows attend to among slots that all of them see, and the lse of their scores.

    ``lse`` is of what they have attended to before.
    """
    if by_gemm(query):
        gained, weight = attend_gemm(query, key[:1], value[:1], lse)
        if weight.amax() <= MOST:  # not so if it is infinite
            weight.clamp_(min=LEAST)
            return gained.div_(weight[..., None]), weight.log_().add_(lse)
    return attend(query, key, value)


def attend(
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "R G S E"],
    value: Float[Tensor, "R G S E"],
    mask: Float[Tensor, "T S"] | None = None,
    *,
    causal: bool = False,
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "R G T"]]:
    """What the rows attend to by torch's kernel, and the lse of their scores.

    ``causal``: where there is no mask, a row sees the keys up to its own place.
    """
    query, key, value = in_float32(query, key, value)
    mask = None if mask is None else mask.to(query.dtype)
    causal = causal and mask is None
    if causal or query.shape[2] >= MANY or not worth_stacking(query):
        return flash(query, key, value, 0.0, causal, attn_mask=mask)
    inputs = (stacked(query)[None], key[:1], value[:1])
    out, lse = flash(*inputs, 0.0, False, attn_mask=for_stacked(mask, query))
    return unstacked(out[0], query), unstacked(lse[0], query)


def attend_backward(
    grad: Float[Tensor, "R G T E"],
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "R G S E"],
    value: Float[Tensor, "R G S E"],
    out: Float[Tensor, "R G T E"],
    lse: Float[Tensor, "R G T"],
    mask: Float[Tensor, "T S"] | None = None,
    *,
    causal: bool = False,
) -> Triple:
    """Gradients of query, key and value; the latter two of all heads together, or of each."""
    grad, query, key, value, out, lse = in_float32(grad, query, key, value, out, lse)
    mask = None if mask is None else mask.to(query.dtype)
    causal = causal and mask is None
    if causal or not worth_stacking(query):
        return flash_backward(grad, query, key, value, out, lse, 0.0, causal, attn_mask=mask)
    onward, rows, before, sums = (stacked(x)[None] for x in (grad, query, out, lse))
    inputs = (onward, rows, key[:1], value[:1], before, sums)
    found = flash_backward(*inputs, 0.0, False, attn_mask=for_stacked(mask, query))
    return unstacked(found[0][0], query), *found[1:]


def worth_stacking(query: Float[Tensor, "R G T E"]) -> bool:
    """Whether heads that share keys go through as rows of one: the kernel is faster with more
    rows, but its backward pass takes the heads in parallel."""
    return len(query) > 1 and query.shape[1] >= torch.get_num_threads()


def for_stacked(mask: Tensor | None, query: Float[Tensor, "R G T E"]) -> Tensor | None:
    """The mask of rows that are stacked."""
    return None if mask is None else mask.repeat(len(query), 1)


def in_float32(*inputs: Float[Tensor, "..."]) -> list[Float[Tensor, "..."]]:
    return [x.to(at_least_float32(x.dtype)) for x in inputs]


def add_gradients(
    tile: Tile, found: Triple, for_query: Float[Tensor, "R G T E"], sums: list[Tensor]
) -> None:
    """Gradients of a tile, to those of query, own pairs and pairs of NTP."""
    for_query[:, :, tile.rows] += found[0]
    count = tile.slots.stop - tile.slots.start
    for pair, mine, before in zip(found[1:], sums[1:3], sums[3:], strict=True):
        summed = (pair.sum(0) if len(pair) > 1 else pair[0]).transpose(0, 1)
        before[tile.slots] += summed[:count]
        if tile.mask is not None:
            mine[tile.rows] += summed[count:]


def by_group(
    query: Tensor, key: Tensor, value: Tensor, ntp_key: Tensor, ntp_value: Tensor
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Queries, own pairs and pairs of NTP in the kernel's order of dimensions and precision."""
    own = [for_all_heads(x, query) for x in (key, value)]
    return heads_first(query, key), own, [for_all_heads(x, query) for x in (ntp_key, ntp_value)]


def diagonal_pairs(tile: Tile, own: list[Tensor], slots: list[Tensor]) -> list[Tensor]:
    """Keys and values of a diagonal tile: slots, then rows if it has a mask."""
    if tile.mask is None:
        return [before[:, :, tile.slots] for before in slots]
    return [
        torch.cat([before[:1, :, tile.slots], mine[:1, :, tile.rows]], 2).expand(
            len(mine), -1, -1, -1
        )
        for before, mine in zip(slots, own, strict=True)
    ]


def merge(
    total: Float[Tensor, "R G T E"],
    total_lse: Float[Tensor, "R G T"],
    out: Float[Tensor, "R G T E"],
    lse: Float[Tensor, "R G T"],
) -> None:
    """Add a tile to ``total`` and its lse to ``total_lse``, in place."""
    total.lerp_(out.to(total.dtype), torch.sigmoid(lse - total_lse)[..., None])
    total_lse.copy_(torch.logaddexp(total_lse, lse))


def heads_first(x: Float[Tensor, "T A E"], key: Float[Tensor, "K G E"]) -> Float[Tensor, "R G T E"]:
    """Heads in the kernel's order; those that share keys and values are its batch."""
    return x.unflatten(1, (key.shape[1], -1)).permute(2, 1, 0, 3)


def for_all_heads(
    x: Float[Tensor, "T G E"], query: Float[Tensor, "M A E"]
) -> Float[Tensor, "R G T E"]:
    """Keys or values in the query's precision, for every head of their group without a copy."""
    return x.to(query.dtype).transpose(0, 1).expand(query.shape[1] // x.shape[1], -1, -1, -1)
