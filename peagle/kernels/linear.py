"""A linear layer whose gradient is added to the weight's ``main_grad`` by the product itself."""

import torch
from jaxtyping import Float
from torch import Tensor

from peagle.kernels.precision import compute_dtype
from peagle.kernels.reference import Reference


def linear(
    x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"], ops: Reference
) -> Float[Tensor, "T O"]:
    """``x @ weight.T`` by the backend's products, under autocast as torch does it."""
    return _Linear.apply(x, weight, ops)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, ops):
        dtype = compute_dtype(x)
        x, ctx.cast, ctx.ops = x.to(dtype), ops.main_grads.cast(weight, dtype), ops
        ctx.main_grad = ops.main_grads.of(weight)
        ctx.save_for_backward(x, weight)
        return ops.product(x, ctx.cast)

    @staticmethod
    def backward(ctx, grad):
        x, _ = ctx.saved_tensors  # torch checks that the weight is what it was
        for_x = ctx.ops.product(grad, ctx.cast.T) if ctx.needs_input_grad[0] else None
        for_weight = None
        if ctx.needs_input_grad[1]:
            for_weight = weight_gradient(ctx.ops, ctx.main_grad, grad.T, x)
        return for_x, for_weight, None


def weight_gradient(
    ops: Reference,
    main_grad: Float[Tensor, "O I"] | None,
    a: Float[Tensor, "O N"],
    b: Float[Tensor, "N I"],
) -> Float[Tensor, "O I"] | None:
    """What a backward pass returns for a weight whose gradient is ``a @ b``: nothing once it has
    been added to the ``main_grad``."""
    total = a.new_zeros(len(a), b.shape[1]) if main_grad is None else main_grad
    ops.add_product(total, a, b)
    return total if main_grad is None else None
