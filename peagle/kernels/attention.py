"""Attention of the two streams: depth 0 over its document, rollouts over [prefix | own rollout].

All tensors are [tokens, heads, head_dim]; sequences are packed, without a batch axis. The rule
that every path obeys is ``cod/visibility.py``.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from peagle.cod.sampling import Rows
from peagle.kernels.cpu.attention import flash_causal_attention, flash_rollout_attention
from peagle.kernels.cpu.attention_tiles import Plan, plan_flash
from peagle.kernels.cpu.flash_kernel import fast_dtype
from peagle.kernels.cuda.cudnn_attention import UNIT_SLOTS, suits
from peagle.kernels.cuda.flex_attention import FlexPlan, flex_rollout_attention, plan_flex

LONG = 2048  # slots of a document, on CUDA
UNPREPARED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PREPARED = [SDPBackend.CUDNN_ATTENTION, *UNPREPARED]


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
    """One document: by cuDNN if it is long, in one of few lengths, which cuDNN prepares for."""
    length, shared = len(query), query.shape[1] // key.shape[1]
    prepared = suits(value) and length > LONG
    kernels = PREPARED if prepared else UNPREPARED
    if value.dtype == torch.float32:  # of the kernels that share keys, none is for float32
        key, value, shared = *(x.repeat_interleave(shared, 1) for x in (key, value)), 1
    states = (query, key, value)
    if prepared and length % UNIT_SLOTS:
        states = (F.pad(x, (0, 0, 0, 0, 0, -length % UNIT_SLOTS)) for x in states)
    states = (x.transpose(0, 1)[None] for x in states)
    with sdpa_kernel(kernels, set_priority=True):
        context = F.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=shared > 1)
    return context[0].transpose(0, 1)[:length]


def plan_attention(
    rows: Rows, document: Int[Tensor, " S"], *, value: Float[Tensor, "S G D"]
) -> Plan | FlexPlan:
    """What follows from the rows of a piece (depth >= 1, sorted) and serves all its layers.

    ``value``: of depth 0, for where and in which precision attention is computed.
    """
    if value.device.type == "cpu":
        return plan_flash(rows, document)
    return plan_flex(rows, document, device=value.device, dense=suits(value))


def rollout_attention(
    query: Float[Tensor, "M A D"],
    key: Float[Tensor, "M G D"],
    value: Float[Tensor, "M G D"],
    prefix_key: Float[Tensor, "S G D"],
    prefix_value: Float[Tensor, "S G D"],
    *,
    plan: Plan | FlexPlan,
    alike: bool = False,
) -> Float[Tensor, "M A D"]:
    """Depths >= 1: every row sees its document's depth-0 slots up to its anchor, and its rollout.

    Depth 0 never looks at deeper rows, so its keys and values are computed once per sequence and
    read here by every piece. ``alike``: rows that stand at the same slot have the same query,
    which is made use of on the CPU.
    """
    inputs = (query, key, value, prefix_key, prefix_value)
    if isinstance(plan, Plan):
        return flash_rollout_attention(*inputs, plan=plan, alike=alike)
    return flex_rollout_attention(*inputs, plan=plan)
