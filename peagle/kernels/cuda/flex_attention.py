"""Attention of rollouts on CUDA: FlexAttention with a block mask that is built, never evaluated.

Keys are ``[depth-0 slots | rows of the piece]``, each padded to whole blocks. A row sees two
ranges of them: the slots of its document up to its anchor, and its rollout up to itself. Rows come
sorted by anchor, so the ranges of a block of rows follow from their extremes: blocks of slots that
all of its rows see (no mask is applied there), a few at the edges, and one or two blocks of rows.

What many rows see in common is left to ``cudnn_attention.py``; the ranges begin behind it.

                 slots                    rows
    block 0      full full part  .        part  .    .
    block 1      full full full part       .   part  .
    block 2       .    .   part full part  .   part part     (another document begins)
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    BlockMask,
    flex_attention,
)

from peagle.cod.sampling import Rows
from peagle.kernels.cuda.cudnn_attention import SharedTile, add_shared, shared_tiles

BLOCK = 128  # FlexAttention's own block size
NARROWEST = 16  # width of a head, for FlexAttention on CUDA


class Ranges(NamedTuple):
    """The keys ``first <= key <= last`` that each query sees."""

    first: Int[Tensor, " Q"]
    last: Int[Tensor, " Q"]

    def blocks(self, count: int) -> tuple[Bool[Tensor, "B K"], Bool[Tensor, "B K"]]:
        """Per block of queries: key blocks that some query may see, and that all of them see."""
        first, last = (x.view(-1, BLOCK) for x in self)
        block = torch.arange(count)
        some = (block >= first.amin(1, True) // BLOCK) & (block <= last.amax(1, True) // BLOCK)
        begin, end = block * BLOCK, block * BLOCK + BLOCK - 1
        return some, (begin >= first.amax(1, True)) & (end <= last.amin(1, True))


class FlexPlan(NamedTuple):
    """How the rows of a piece (depth >= 1, sorted) see the NTP slots and their own rollouts;
    all its layers share it."""

    mask: BlockMask
    shared: list[SharedTile]  # what the mask leaves out


def plan_flex(
    rows: Rows, document: Int[Tensor, " S"], *, device: torch.device, cudnn: bool
) -> FlexPlan:
    """``cudnn``: take what many rows see in common out of the mask."""
    tiles = shared_tiles(rows, document) if cudnn else []
    return FlexPlan(block_mask(rows, document, tiles, device), tiles)


def block_mask(
    rows: Rows, document: Int[Tensor, " S"], shared: Sequence[SharedTile], device: torch.device
) -> BlockMask:
    """What the rows see, but for the shared tiles.

    Rows that only fill up the last block see what the last row sees, and themselves: a softmax
    over nothing would be NaN.
    """
    slots, count = whole_blocks(len(document)), len(rows.anchor)
    number = torch.arange(whole_blocks(count))
    row = number.clamp(max=count - 1)
    anchor = rows.anchor[row]
    begin = torch.searchsorted(document, document[rows.anchor])
    for tile in shared:
        begin[tile.rows] = tile.slots.stop
    ntp = Ranges(begin[row], anchor)
    start = torch.where(number < count, row - rows.depth[row] + 1, number)
    own = Ranges(slots + start, slots + number)
    total = (slots + len(number)) // BLOCK
    some, full = ntp.blocks(total)
    beside, _ = own.blocks(total)
    return BlockMask.from_kv_blocks(
        *ordered((some & ~full) | beside, device),
        *ordered(full, device),
        BLOCK_SIZE=BLOCK,
        mask_mod=seen_by(ntp, own, device),
        seq_lengths=(len(number), slots + len(number)),
    )


def whole_blocks(length: int) -> int:
    return -(-length // BLOCK) * BLOCK


def ordered(
    blocks: Bool[Tensor, "B K"], device: torch.device
) -> tuple[Int[Tensor, "1 1 B"], Int[Tensor, "1 1 B K"]]:
    """How many key blocks each block of queries has, and which: these first."""
    indices = torch.argsort(blocks.logical_not(), dim=-1, stable=True)
    return tuple(
        x.int()[None, None].to(device, non_blocking=True) for x in (blocks.sum(-1), indices)
    )


def seen_by(ntp: Ranges, own: Ranges, device: torch.device) -> Callable[..., Tensor]:
    """Tensors only, no lengths: a kernel compiled once then serves pieces of every length."""
    begin, anchor, first, last = (x.int().to(device, non_blocking=True) for x in (*ntp, *own))

    return lambda batch, head, query, key: (
        ((key >= begin[query]) & (key <= anchor[query]))
        | ((key >= first[query]) & (key <= last[query]))
    )


@cache
def compiled() -> Callable[..., tuple[Tensor, AuxOutput]]:
    return torch.compile(flex_attention, dynamic=True)


def flex_mtp_attention(
    query: Float[Tensor, "M A E"],
    key: Float[Tensor, "M G E"],
    value: Float[Tensor, "M G E"],
    ntp_key: Float[Tensor, "S G E"],
    ntp_value: Float[Tensor, "S G E"],
    *,
    plan: FlexPlan,
    kernel: Callable[..., tuple[Tensor, AuxOutput]] | None = None,
) -> Float[Tensor, "M A E"]:
    """Every row sees its document's depth-0 slots up to its anchor, and its rollout so far.

    ``kernel``: FlexAttention itself, compiled unless given.
    """
    pairs = [
        torch.cat([filled(before), filled(mine)])
        for before, mine in ((ntp_key, key), (ntp_value, value))
    ]
    width = value.shape[-1]
    queries, keys, values = (heads_first(x, value.dtype) for x in (filled(query), *pairs))
    out, aux = (kernel or compiled())(
        queries,
        keys,
        values,
        block_mask=plan.mask,
        scale=width**-0.5,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    context = add_shared(queries, keys, values, out, aux.lse, plan.shared)
    return context[0].transpose(0, 1)[: len(query), :, :width]


def heads_first(x: Float[Tensor, "T A E"], dtype: torch.dtype) -> Float[Tensor, "1 A T E"]:
    return x.to(dtype).transpose(0, 1)[None]


def filled(x: Float[Tensor, "T A E"]) -> Float[Tensor, "T2 A E2"]:
    """With zeros up to whole blocks, and to the narrowest head that there is a kernel for."""
    return F.pad(x, (0, max(0, NARROWEST - x.shape[-1]), 0, 0, 0, whole_blocks(len(x)) - len(x)))
