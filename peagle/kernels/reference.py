"""Plain PyTorch: what every backend computes, on any device.

It explains the others, they are tested against it, and it serves devices that have no backend of
their own (MPS, ROCm, XPU).
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from peagle.cod.mask import visible
from peagle.cod.sampling import Rows
from peagle.kernels.device import without_autocast
from peagle.kernels.grad_accumulation import MainGrads
from peagle.kernels.precision import at_least_float32

Angles = tuple[Float[Tensor, "T 1 F"], Float[Tensor, "T 1 F"]]  # cosines, sines


class Reference:
    """All that the drafter and its loss compute.

    Tensors are packed without a batch axis: [tokens, width] or [tokens, heads, head_dim].

    Args:
        main_grads: where the gradients of pieces are accumulated; none outside training.
    """

    row_unit = 1  # MTP rows of a piece come in multiples of it
    head_chunk = 512  # rows whose logits exist at a time

    def __init__(self, main_grads: MainGrads | None = None):
        self.main_grads = MainGrads(()) if main_grads is None else main_grads

    def accumulating(self, main_grads: MainGrads) -> "Reference":
        """The same backend, adding gradients to ``main_grads``."""
        return type(self)(main_grads)

    # --- layers

    def linear(
        self,
        x: Float[Tensor, "T I"],
        weight: Float[Tensor, "O I"],
        bias: Float[Tensor, " O"] | None = None,
    ) -> Float[Tensor, "T O"]:
        """``x @ weight.T + bias``"""
        return F.linear(x, weight, bias)

    def rms_norm(
        self, x: Float[Tensor, "*T D"], weight: Float[Tensor, " D"], eps: float
    ) -> Float[Tensor, "*T D"]:
        """In float32 or better, rounded to the precision of ``x`` at the end."""
        dtype = at_least_float32(x.dtype)
        return F.rms_norm(x.to(dtype), weight.shape, weight.to(dtype), eps).to(x.dtype)

    def rotate(self, x: Float[Tensor, "#T A E"], angles: Angles) -> Float[Tensor, "T A E"]:
        """Rotary embedding, in the precision of the angles. One row may stand for all."""
        cos, sin = angles
        first, second = x.to(cos.dtype).chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)

    def feed_forward(
        self,
        x: Float[Tensor, "T D"],
        gate: Float[Tensor, "I D"],
        up: Float[Tensor, "I D"],
        down: Float[Tensor, "D I"],
    ) -> Float[Tensor, "T D"]:
        """``down(silu(gate(x)) * up(x))``"""
        return self.linear(F.silu(self.linear(x, gate)) * self.linear(x, up), down)

    # --- attention

    def attention_dtype(
        self, hidden: Float[Tensor, "S D"], document_lengths: list[int]
    ) -> torch.dtype:
        """Precision of queries and keys where the drafter computes in that of ``hidden``."""
        return hidden.dtype

    def ntp_attention(
        self,
        query: Float[Tensor, "S A E"],
        key: Float[Tensor, "S G E"],
        value: Float[Tensor, "S G E"],
        *,
        document_lengths: list[int],
    ) -> Float[Tensor, "S A E"]:
        """NTP: every slot sees the slots of its document up to itself."""
        documents = zip(*(x.split(document_lengths) for x in (query, key, value)), strict=True)
        return torch.cat([masked_attention(*document, None) for document in documents])

    def plan_mtp_attention(
        self, rows: Rows, document: Int[Tensor, " S"], *, value: Float[Tensor, "S G E"]
    ) -> Any:
        """What follows from the rows of a piece (depth >= 1, sorted) and serves all layers.

        ``value`` is of NTP: it says where and in which precision attention is computed.
        """
        slots = torch.arange(len(document))
        keys = Rows(
            torch.cat([slots, rows.anchor]), torch.cat([torch.zeros_like(slots), rows.depth])
        )
        return visible(rows, keys, document).to(value.device)

    def mtp_attention(
        self,
        query: Float[Tensor, "M A E"],
        key: Float[Tensor, "M G E"],
        value: Float[Tensor, "M G E"],
        ntp_key: Float[Tensor, "S G E"],
        ntp_value: Float[Tensor, "S G E"],
        *,
        plan: Any,
    ) -> Float[Tensor, "M A E"]:
        """MTP: every row sees its document's slots up to its anchor, and its rollout so far."""
        keys = torch.cat([ntp_key, key.to(ntp_key.dtype)])
        values = torch.cat([ntp_value, value.to(ntp_value.dtype)])
        return masked_attention(query, keys, values, plan).to(value.dtype)

    # --- head and loss, without autograd

    def product(
        self, x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]
    ) -> Float[Tensor, "T O"]:
        """``x @ weight.T``"""
        return x @ weight.T

    def add_product(
        self, total: Float[Tensor, "O I"], a: Float[Tensor, "O N"], b: Float[Tensor, "N I"]
    ) -> None:
        """``total += a @ b``, summed in the precision of ``total``."""
        total += a @ b

    def first_choice(self, logits: Float[Tensor, "C W"]) -> Int[Tensor, " C"]:
        return logits.argmax(-1)

    def loss_rows(self, logits: Float[Tensor, "C W"]) -> int:
        """How many rows of a chunk to finish at a time."""
        return max(1, len(logits))

    def pad_rows(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N2 D"]:
        """With rows of zeros up to a number that the device is fast at."""
        return states

    def fused_loss(self, dtype: torch.dtype) -> tuple[Callable, Callable] | None:
        """Kernels that take the place of ``loss.target_of`` and ``loss.finish``, if there are."""
        return None


def masked_attention(
    query: Float[Tensor, "T A E"],
    key: Float[Tensor, "N G E"],
    value: Float[Tensor, "N G E"],
    mask: Tensor | None,
) -> Float[Tensor, "T A E"]:
    """Scaled dot-product attention: by the mask [T, N], or causal without one."""
    states = (x.to(query.dtype).transpose(0, 1)[None] for x in (query, key, value))
    with without_autocast(query.device):
        context = F.scaled_dot_product_attention(
            *states,
            attn_mask=mask,
            is_causal=mask is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return context[0].transpose(0, 1).to(value.dtype)
