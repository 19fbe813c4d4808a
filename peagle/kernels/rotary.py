"""Rotary embedding whose backward pass is a rotation back: a third of autograd's own passes."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]


def rotate(
    x: Float[Tensor, "#T A E"],
    cos: Float[Tensor, "T 1 F"],
    sin: Float[Tensor, "T 1 F"],
    turn: Turn,
) -> Float[Tensor, "T A E"]:
    """In the precision of the angles. ``turn``: the rotation itself, as the device runs it best."""
    return _Rotation.apply(x, cos, sin, turn)


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, turn):
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.dtype, ctx.turn = x.shape, x.dtype, turn
        return turn(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        for_x = ctx.turn(grad, cos, -sin).sum_to_size(ctx.shape).to(ctx.dtype)
        return for_x, None, None, None
