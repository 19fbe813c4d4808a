"""The gated feed-forward of a layer: Llama's, in less memory.

Autograd would keep four tensors of [T, I] per layer. Two of them follow from the others, and the
backward pass works in the memory that the forward pass has kept. On the CPU what lies between the
products is done for as many rows at a time as a cache holds.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaMLP

from peagle.kernels.cuda.compiled import fused
from peagle.kernels.grad_accumulation import factor_of, gradient, held_of
from peagle.kernels.products import compute_dtype

ELEMENTS = 2**18  # of one tensor that a CPU's cache holds beside others


class FeedForward(LlamaMLP):
    """``down(silu(gate(x)) * up(x))``."""

    def forward(self, x: Float[Tensor, "T D"]) -> Float[Tensor, "T D"]:
        if not torch.is_grad_enabled() or not self.plain():
            return super().forward(x)
        weights = [part.weight for part in (self.gate_proj, self.up_proj, self.down_proj)]
        return _FeedForward.apply(x.to(compute_dtype(x)), *weights)

    def plain(self) -> bool:
        """Whether the configuration asks for what is computed here."""
        return self.config.hidden_act == "silu" and self.down_proj.bias is None


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *weights):
        ctx.held = [held_of(weight) for weight in weights]
        ctx.factors = [factor_of(weight, x.dtype) for weight in weights]
        to_gate, to_up, to_down = ctx.factors
        gate, up = to_gate.product(x), to_up.product(x)
        inner = torch.empty_like(gate)
        for into, some, others in rows_at_a_time(inner, gate, up):
            gate_up(into, some, others)
        ctx.save_for_backward(x, gate, up, *weights)
        return to_down.product(inner)

    @staticmethod
    def backward(ctx, grad):
        x, gate, up, *_ = ctx.saved_tensors  # torch checks that weights are what they were
        to_gate, to_up, to_down = ctx.factors
        slope = to_down.product_back(grad)
        # A second backward pass raises, since these are overwritten: saved tensors have versions.
        for some, others, onward in rows_at_a_time(gate, up, slope):
            gate_up_backward(some, others, onward)
        for_x = to_gate.product_back(gate).add_(to_up.product_back(slope))
        pairs = zip(ctx.held, ((gate, x), (slope, x), (grad, up)), strict=True)
        return for_x, *(gradient(held, a.T, b) for held, (a, b) in pairs)


@fused
def gate_up(
    into: Float[Tensor, "T I"], gate: Float[Tensor, "T I"], up: Float[Tensor, "T I"]
) -> None:
    torch.mul(F.silu(gate), up, out=into)


@fused
def gate_up_backward(
    gate: Float[Tensor, "T I"], up: Float[Tensor, "T I"], slope: Float[Tensor, "T I"]
) -> None:
    """In place: gate and slope become the gradients of gate and up, up becomes what went down."""
    active, through = F.silu(gate), slope * up
    up.mul_(active)
    slope.mul_(active)
    gate.copy_(torch.ops.aten.silu_backward(through, gate))


def rows_at_a_time(*tensors: Float[Tensor, "T I"]) -> Iterator[tuple[Float[Tensor, "t I"], ...]]:
    """The same rows of each."""
    rows, width = tensors[0].shape
    count = max(1, ELEMENTS // width if tensors[0].device.type == "cpu" else rows)
    return zip(*(x.split(count) for x in tensors), strict=True)
