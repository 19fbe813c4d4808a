"""Attention of the two streams: depth 0 over its document, rollouts over [prefix | own rollout].

All tensors are [tokens, heads, head_dim]; sequences are packed, without a batch axis. The rule
that every path obeys is ``cod/visibility.py``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask

from peagle.cod.rollouts import Rows
from peagle.model.attention_plan import Plan, plan_flash
from peagle.model.flash import flash_causal_attention, flash_rollout_attention
from peagle.model.flex import flex_rollout_attention, plan_flex
from peagle.model.kernel import fast_dtype


def kernel_dtype(x: Float[Tensor, "..."], document_lengths: list[int]) -> torch.dtype:
    """Precision of queries and keys where the drafter computes in that of ``x``."""
    return fast_dtype(x.dtype, max(document_lengths)) if x.device.type == "cpu" else x.dtype


def causal_attention(
    query: Float[Tensor, "S A D"],
    key: Float[Tensor, "S G D"],
    value: Float[Tensor, "S G D"],
    *,
    document_lengths: list[int],
) -> Float[Tensor, "S A D"]:
    """Depth 0: every slot sees the slots of its document up to itself."""
    if query.device.type == "cpu":
        return flash_causal_attention(query, key, value, document_lengths=document_lengths)
    parts = zip(*(t.split(document_lengths) for t in (query, key, value)), strict=True)
    return torch.cat([causal(q, k, v) for q, k, v in parts])


def causal(
    query: Float[Tensor, "s A D"], key: Float[Tensor, "s G D"], value: Float[Tensor, "s G D"]
) -> Float[Tensor, "s A D"]:
    context = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],  # [1, A, s, D]
        key.transpose(0, 1)[None],
        value.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return context[0].transpose(0, 1)


def plan_attention(
    rows: Rows, document: Int[Tensor, " S"], *, device: torch.device
) -> Plan | BlockMask:
    """What follows from the rows of a segment (depth >= 1, sorted) and serves all its layers."""
    if device.type == "cpu":
        return plan_flash(rows, document)
    return plan_flex(rows, document, device=device)


def rollout_attention(
    query: Float[Tensor, "M A D"],
    key: Float[Tensor, "M G D"],
    value: Float[Tensor, "M G D"],
    prefix_key: Float[Tensor, "S G D"],
    prefix_value: Float[Tensor, "S G D"],
    *,
    plan: Plan | BlockMask,
    alike: bool = False,
) -> Float[Tensor, "M A D"]:
    """Depths >= 1: every row sees its document's depth-0 slots up to its anchor, and its rollout.

    Depth 0 never looks at deeper rows, so its keys and values are computed once per sequence and
    read here by every segment. ``alike``: rows that stand at the same slot have the same query,
    which is made use of on the CPU.
    """
    inputs = (query, key, value, prefix_key, prefix_value)
    if isinstance(plan, Plan):
        return flash_rollout_attention(*inputs, plan=plan, alike=alike)
    return flex_rollout_attention(*inputs, plan=plan)
