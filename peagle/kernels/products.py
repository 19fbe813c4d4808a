"""Linear layers whose products and gradients are those of ``onednn.py``."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from peagle.kernels.cpu.onednn import suits
from peagle.kernels.grad_accumulation import factor_of, gradient, held_of


def compute_dtype(x: Float[Tensor, "..."]) -> torch.dtype:
    """What autocast makes of a matrix product with ``x``."""
    kind = x.device.type
    cast = torch.is_autocast_enabled(kind) and x.dtype != torch.float64
    return torch.get_autocast_dtype(kind) if cast else x.dtype


def product(x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "T O"]:
    """``x @ weight.T``, differentiable, under autocast as torch does it."""
    autocast = torch.is_autocast_enabled(x.device.type)
    shared = held_of(weight) is not None and compute_dtype(x) == compute_dtype(weight)
    if shared or (suits(x, weight) and not autocast):
        return _Product.apply(x, weight)
    return F.linear(x, weight)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        dtype, ctx.held = compute_dtype(x), held_of(weight)
        x, ctx.factor = x.to(dtype), factor_of(weight, dtype)
        ctx.save_for_backward(x, weight)
        return ctx.factor.product(x)

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors  # torch checks that the weight is what it was
        for_x = ctx.factor.product_back(grad) if ctx.needs_input_grad[0] else None
        for_weight = gradient(ctx.held, grad.T, x) if ctx.needs_input_grad[1] else None
        return for_x, for_weight


class Linear(nn.Linear):
    """``nn.Linear`` with these products."""

    def forward(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        out = product(x, self.weight)
        return out if self.bias is None else out + self.bias


def speed_up(module: nn.Module) -> None:
    """Let all linear layers of ``module`` compute this way."""
    for layer in module.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
