"""Attention of the two streams: depth 0 over its document, rollouts over [prefix | own rollout].

All tensors are [tokens, heads, head_dim]; sequences are packed, without a batch axis.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from peagle.cod.rollouts import Rows
from peagle.cod.visibility import visible

BLOCK_ROWS = 256  # query rows per call: small enough to skip most of the invisible prefix


class Block(NamedTuple):
    """Whole rollouts ``rows`` of a segment and the depth-0 slots ``prefix`` they can see."""

    rows: slice
    prefix: slice
    mask: Bool[Tensor, "q k"]  # keys: the prefix slots, then the block's own rows


def attend(
    query: Float[Tensor, "q A D"],
    key: Float[Tensor, "k G D"],
    value: Float[Tensor, "k G D"],
    *,
    mask: Bool[Tensor, "q k"] | None,
) -> Float[Tensor, "q A D"]:
    """Scaled dot-product attention of one block; causal when there is no mask."""
    context = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],  # [1, A, q, D]
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        attn_mask=mask,
        is_causal=mask is None,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return context[0].transpose(0, 1)


def causal_attention(
    query: Float[Tensor, "S A D"],
    key: Float[Tensor, "S G D"],
    value: Float[Tensor, "S G D"],
    *,
    document_lengths: list[int],
) -> Float[Tensor, "S A D"]:
    """Depth 0: every slot sees the slots of its document up to itself."""
    parts = zip(*(t.split(document_lengths) for t in (query, key, value)), strict=True)
    return torch.cat([attend(q, k, v, mask=None) for q, k, v in parts])


def plan_blocks(rows: Rows, document: Int[Tensor, " S"]) -> list[Block]:
    """Cut the rows of a segment (depth >= 1, sorted) into blocks of whole rollouts."""
    if len(rows.anchor) == 0:
        return []
    starts = torch.nonzero(rows.depth == 1).flatten()  # where each rollout begins
    block = starts // BLOCK_ROWS
    first = torch.ones_like(block, dtype=torch.bool)
    first[1:] = block[1:] != block[:-1]
    edges = [*starts[first].tolist(), len(rows.anchor)]
    return [plan_block(rows, document, a, b) for a, b in pairwise(edges)]


def plan_block(rows: Rows, document: Int[Tensor, " S"], start: int, stop: int) -> Block:
    own = Rows(rows.anchor[start:stop], rows.depth[start:stop])
    begin = int(torch.searchsorted(document, document[own.anchor[0]]))
    prefix = torch.arange(begin, int(own.anchor[-1]) + 1, device=document.device)
    keys = Rows(torch.cat([prefix, own.anchor]), torch.cat([torch.zeros_like(prefix), own.depth]))
    return Block(
        slice(start, stop), slice(begin, begin + len(prefix)), visible(own, keys, document)
    )


def rollout_attention(
    query: Float[Tensor, "M A D"],
    key: Float[Tensor, "M G D"],
    value: Float[Tensor, "M G D"],
    prefix_key: Float[Tensor, "S G D"],
    prefix_value: Float[Tensor, "S G D"],
    *,
    blocks: list[Block],
) -> Float[Tensor, "M A D"]:
    """Depths >= 1: every row sees its document's depth-0 slots up to its anchor, and its rollout.

    Depth 0 never looks at deeper rows, so its keys and values are computed once per sequence and
    read here by every segment.
    """
    return torch.cat(
        [
            attend(
                query[block.rows],
                torch.cat([prefix_key[block.prefix], key[block.rows]]),
                torch.cat([prefix_value[block.prefix], value[block.rows]]),
                mask=block.mask,
            )
            for block in blocks
        ]
    )
