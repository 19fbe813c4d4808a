"""Llama's gated feed-forward in less memory.

Autograd would keep four tensors of [T, I] per layer. Two of the four are computed again from the
other two, and the backward pass works in the memory that the forward pass has kept.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from peagle.kernels.linear import weight_gradient
from peagle.kernels.precision import compute_dtype
from peagle.kernels.reference import Reference

Elementwise = Callable[..., None]


def feed_forward(
    x: Float[Tensor, "T D"],
    gate: Float[Tensor, "I D"],
    up: Float[Tensor, "I D"],
    down: Float[Tensor, "D I"],
    ops: Reference,
    elementwise: tuple[Elementwise, Elementwise],
) -> Float[Tensor, "T D"]:
    """``down(silu(gate(x)) * up(x))``.

    ``elementwise``: ``gate_up`` and ``gate_up_backward``, as the device runs them best.
    """
    return _FeedForward.apply(x.to(compute_dtype(x)), gate, up, down, ops, elementwise)


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate, up, down, ops, elementwise):
        weights = (gate, up, down)
        ctx.ops, ctx.elementwise = ops, elementwise
        ctx.main_grads = [ops.main_grads.of(weight) for weight in weights]
        casts = [ops.main_grads.cast(weight, x.dtype) for weight in weights]
        gated, upward = ops.product(x, casts[0]), ops.product(x, casts[1])
        inner = torch.empty_like(gated)
        elementwise[0](inner, gated, upward)
        ctx.save_for_backward(x, gated, upward, *weights)
        # A cast that no piece shares is made again: kept, it would live until NTP's backward pass.
        pairs = zip(casts, ctx.main_grads, strict=True)
        ctx.casts = [None if main_grad is None else cast for cast, main_grad in pairs]
        return ops.product(inner, casts[2])

    @staticmethod
    def backward(ctx, grad):
        x, gated, upward, *weights = ctx.saved_tensors
        pairs = zip(ctx.casts, weights, strict=True)
        casts = (weight.to(x.dtype) if cast is None else cast for cast, weight in pairs)
        ops, (gate, up, down) = ctx.ops, casts
        slope = ops.product(grad, down.T)
        # A second backward pass raises, since these are overwritten: saved tensors have versions.
        ctx.elementwise[1](gated, upward, slope)
        for_x = ops.product(gated, gate.T).add_(ops.product(slope, up.T))
        pairs = zip(ctx.main_grads, ((gated, x), (slope, x), (grad, upward)), strict=True)
        for_weights = (weight_gradient(ops, main_grad, a.T, b) for main_grad, (a, b) in pairs)
        return for_x, *for_weights, None, None


def gate_up(
    into: Float[Tensor, "T I"], gate: Float[Tensor, "T I"], up: Float[Tensor, "T I"]
) -> None:
    torch.mul(F.silu(gate), up, out=into)


def gate_up_backward(
    gate: Float[Tensor, "T I"], up: Float[Tensor, "T I"], slope: Float[Tensor, "T I"]
) -> None:
    """In place: gate and slope become the gradients of gate and up, and up becomes the input of the
    down projection."""
    active, through = F.silu(gate), slope * up
    up.mul_(active)
    slope.mul_(active)
    gate.copy_(torch.ops.aten.silu_backward(through, gate))
