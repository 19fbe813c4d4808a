"""Matrix products of float32 weights on the CPU, by the faster of the two libraries inside torch.

torch gives float32 products to MKL, which on other makers' processors does without half of what
they can. oneDNN, which torch has for bf16, does not: LOG.md has the rates. Both compute in
float32 and differ in rounding only.

oneDNN and its wrapper keep the code that they made for the last 1,024 shapes each. Every step has
numbers of rows of its own, so that most of it is never used again: on the quickstart it grew to a
gigabyte. Both read their limits from the environment when they are first used.
"""

import os

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from peagle.model.held import cast, gradient, held_of

# As many as a layer of a segment has, forward and back, so that the layers share them; what a user
# has set stays.
CACHE_LIMITS = {
    name: "48"
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    if name not in os.environ
}
os.environ.update(CACHE_LIMITS)

ROW_UNIT = 64  # rows come in multiples of it where they can be chosen, so that kinds are few
FEW = 128  # rows below which laying out the weight costs oneDNN more than it gains
FAST = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()


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


def suits(x: Float[Tensor, "..."], weight: Float[Tensor, "..."]) -> bool:
    exact = x.dtype == weight.dtype == torch.float32
    return FAST and exact and x.device.type == "cpu" and len(x) >= FEW


def plain_product(x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "T O"]:
    """``x @ weight.T`` without gradients."""
    if suits(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return x @ weight.T


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        dtype, ctx.held = compute_dtype(x), held_of(weight)
        x, weight = x.to(dtype), cast(weight, dtype)
        ctx.save_for_backward(x, weight)
        return plain_product(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        for_x = plain_product(grad, weight.T) if ctx.needs_input_grad[0] else None
        # Of this form MKL is as fast as oneDNN.
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
