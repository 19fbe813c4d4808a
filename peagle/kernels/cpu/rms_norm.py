"""RMS norm on the CPU, which has no kernel for it: PyTorch's own takes three times the passes."""

import torch
from jaxtyping import Float
from torch import Tensor

from peagle.kernels.precision import at_least_float32


def rms_norm(
    x: Float[Tensor, "*T D"], weight: Float[Tensor, " D"], eps: float
) -> Float[Tensor, "*T D"]:
    """In float32 or better, rounded to the precision of ``x`` at the end."""
    return _RMSNorm.apply(x.flatten(0, -2), weight, eps).view(x.shape)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        dtype = at_least_float32(x.dtype)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=dtype)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, scale = ctx.saved_tensors
        x, grad, exact = (t.to(scale.dtype) for t in (inputs, grad, weight))
        product = grad * x
        grad_weight = (scale.T @ product)[0]
        along = (product @ exact)[:, None] * scale.square() / x.shape[-1]
        grad_x = (grad * exact).addcmul_(x, along, value=-1).mul_(scale)
        return grad_x.to(inputs.dtype), grad_weight.to(weight.dtype), None
