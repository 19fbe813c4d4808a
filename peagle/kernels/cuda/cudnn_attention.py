"""Attention on CUDA to slots that all rows of a tile see: most of what attention is.

FlexAttention's kernels reach half of what cuDNN's do, which know no such mask. As on the CPU
(``cpu/attention_tiles.py``), a softmax over disjoint keys is put together by their log-sum-exp
(lse), and the backward pass of a tile takes the output and the lse of all that its rows see.

cuDNN prepares itself for a shape when it first meets it, in an eighth of a second. So tiles come in
few shapes: pieces have equally many rows, and slots are multiples of a large unit. What is left
goes with what is masked.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peagle.cod.sampling import Rows
from peagle.kernels.cuda.compiled import fused

MOST_ROWS = 2048
UNIT_ROWS = 64
UNIT_SLOTS = 512
LEAST_PAIRS = 2**20  # of a row and a slot; fewer are not worth the calls

forward = torch.ops.aten._scaled_dot_product_cudnn_attention
backward = torch.ops.aten._scaled_dot_product_cudnn_attention_backward


class SharedTile(NamedTuple):
    """Rows of one document, and slots of it that all of them see."""

    rows: slice
    slots: slice


def is_supported(value: Float[Tensor, "T G E"]) -> bool:
    """Whether cuDNN's kernels take such values, on a GPU for which they are the fastest."""
    if not value.is_cuda or torch.version.hip or not torch.backends.cudnn.is_available():
        return False
    measured = torch.cuda.get_device_capability(value.device)[0] == 9  # Hopper
    half, width = value.dtype in (torch.bfloat16, torch.float16), value.shape[-1]
    return measured and half and width % 8 == 0 and 16 <= width <= 128


def shared_tiles(rows: Rows, document: Int[Tensor, " S"]) -> list[SharedTile]:
    """What rows of depth 1 and more (sorted) see in common, document by document."""
    number = document[rows.anchor]
    cuts = torch.nonzero(number[1:] != number[:-1]).flatten() + 1
    bounds = [0, *cuts.tolist(), len(number)]
    tiles = []
    for start, stop in pairwise(bounds):
        begin = int(torch.searchsorted(document, number[start]))
        for first in range(start, stop, MOST_ROWS):
            count = min(stop - first, MOST_ROWS) // UNIT_ROWS * UNIT_ROWS
            seen = (int(rows.anchor[first]) + 1 - begin) // UNIT_SLOTS * UNIT_SLOTS
            if count * seen >= LEAST_PAIRS:
                tiles.append(SharedTile(slice(first, first + count), slice(begin, begin + seen)))
    return tiles


def add_shared(
    query: Float[Tensor, "1 A M E"],
    key: Float[Tensor, "1 G S E"],
    value: Float[Tensor, "1 G S E"],
    out: Float[Tensor, "1 A M E"],
    lse: Float[Tensor, "1 A M"],
    tiles: list[SharedTile],
) -> Float[Tensor, "1 A M E"]:
    """What the rows attend to in all, given what they attend to outside the tiles.

    ``lse`` is the log-sum-exp of the scores outside.
    """
    return _Shared.apply(query, key, value, out, lse, tiles) if tiles else out


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, query, key, value, out, lse, tiles):
        total, total_lse = out.clone(), lse.clone()
        ctx.tiles, ctx.seeds = tiles, []
        for rows, slots in tiles:
            asked = query[:, :, rows], key[:, :, slots], value[:, :, slots]
            more, more_lse, *_, seed, offset, _ = forward(*asked, None, True)
            more_lse = more_lse.view(more.shape[:3])
            merge(total[:, :, rows], total_lse[:, :, rows], more, more_lse)
            ctx.seeds.append((seed, offset))
        ctx.save_for_backward(query, key, value, out, lse, total, total_lse)
        return total

    @staticmethod
    def backward(ctx, grad):
        query, key, value, out, lse, total, total_lse = ctx.saved_tensors
        for_query = torch.zeros_like(query)
        for_key, for_value = (torch.zeros_like(x, dtype=total_lse.dtype) for x in (key, value))
        for (rows, slots), seeds in zip(ctx.tiles, ctx.seeds, strict=True):
            asked = query[:, :, rows], key[:, :, slots], value[:, :, slots]
            count, length = asked[0].shape[2], asked[1].shape[2]
            tile_lse = total_lse[:, :, rows].contiguous()[..., None]
            found = backward(
                grad[:, :, rows], *asked, total[:, :, rows], tile_lse, *seeds,
                None, None, None, count, length, 0.0, False,
            )  # fmt: skip
            for_query[:, :, rows] = found[0]
            for_key[:, :, slots] += found[1]
            for_value[:, :, slots] += found[2]
        onward = gradients_outside(grad, out, total, torch.exp(lse - total_lse))
        return for_query, for_key.to(key.dtype), for_value.to(key.dtype), *onward, None


@fused
def merge(
    total: Float[Tensor, "1 A q E"],
    total_lse: Float[Tensor, "1 A q"],
    out: Float[Tensor, "1 A q E"],
    lse: Float[Tensor, "1 A q"],
) -> None:
    """Add a tile to ``total`` and its lse to ``total_lse``, in place."""
    share = torch.sigmoid(lse - total_lse)[..., None]
    exact = total.to(share.dtype)
    total.copy_(exact + share * (out.to(share.dtype) - exact))
    total_lse.copy_(torch.logaddexp(total_lse, lse))


@fused
def gradients_outside(
    grad: Float[Tensor, "1 A M E"],
    out: Float[Tensor, "1 A M E"],
    total: Float[Tensor, "1 A M E"],
    share: Float[Tensor, "1 A M"],
) -> tuple[Float[Tensor, "1 A M E"], Float[Tensor, "1 A M"]]:
    """Gradients of ``out``, which has this share of ``total``, and of its lse."""
    slope = (grad * (out.to(share.dtype) - total)).sum(-1) * share
    return (grad * share[..., None]).to(out.dtype), slope
