"""Gradients of a sum of which each part is differentiated as soon as it is computed.

What all parts read is held meanwhile. What products make of a weight (``weight.py``) is made once.
Gradients are added to their sums where they are found (a weight's by the product itself, as
Megatron does with its ``main_grad``), so that no part makes a copy of all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from peagle.kernels.cpu.onednn import add_product
from peagle.kernels.cpu.packed_weight import Weight


def held_sum(
    parts: Sequence[Callable[[Any], Tensor]], shared: Any, parameters: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """``sum(part(shared) for part in parts)``, with only one part's activations alive at a time.

    Each part is differentiated as soon as it is computed; what remains are the summed gradients
    of ``shared`` (tensors in tuples) and of ``parameters``, handed out when the result is
    differentiated. A part must not scale the loss of the head (``head_loss``).
    """
    tensors, form = tree_flatten(shared)
    return _HeldSum.apply(parts, form, len(tensors), *tensors, *parameters)


class _HeldSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, parts, form, count, *inputs):
        leaves = [x.detach().requires_grad_() for x in inputs[:count]]
        shared = tree_unflatten(leaves, form)
        variables = [*leaves, *inputs[count:]]
        # Zeros, not None: DDP waits for every parameter, and a draw may leave one unused.
        # In float32 also for what is bf16, so that many parts are rounded once.
        sums = [torch.zeros_like(x, dtype=at_least_float(x.dtype)) for x in variables]
        ctx.dtypes = [x.dtype for x in variables]
        total = torch.zeros((), dtype=torch.float32, device=leaves[0].device)
        with ExitStack() as stack:
            for x, found in zip(variables, sums, strict=True):
                stack.enter_context(holding(x, found))
            for run in parts:
                with torch.enable_grad():
                    loss = run(shared)
                # As loss.backward() runs outside autocast: what a backward pass has in float32, it
                # must not round.
                with torch.autocast(loss.device.type, enabled=False):
                    torch.autograd.grad(loss, variables, allow_unused=True)  # see holding
                total = total + loss.detach()
        ctx.save_for_backward(*sums)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        sums = ctx.saved_tensors
        scaled = (grad.mul_(grad_total.to(grad.dtype)) for grad in sums)
        return None, None, None, *(x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True))


def at_least_float(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class Held:
    """A weight while the parts of a held sum run."""

    def __init__(self, weight: Tensor, grad: Tensor):
        self.weight, self.grad = weight, grad
        self.factor: Weight | None = None

    def to(self, dtype: torch.dtype) -> Weight:
        """The weight in this precision; the last one that was asked for is kept."""
        if self.factor is None or self.factor.dtype != dtype:
            self.factor = Weight(self.weight, dtype, lasting=True)
        return self.factor


@contextmanager
def holding(x: Tensor, found: Tensor) -> Iterator[None]:
    """Let every gradient of ``x`` be added to ``found``.

    By products (``gradient``) as they compute it; else as soon as autograd has it:
    ``autograd.grad`` keeps what it finds until its end, so of a gradient that was added it is
    given a zero without memory.
    """

    def add(grad: Tensor | None) -> Tensor | None:
        if grad is None:
            return None
        found.add_(grad)
        return grad.new_zeros(()).expand_as(grad)

    assert held_of(x) is None, "a tensor is held once"
    handle, x.held = x.register_hook(add), Held(x, found)
    try:
        yield
    finally:
        handle.remove()
        del x.held


def held_of(weight: Tensor) -> Held | None:
    """What is held of ``weight`` just now."""
    return getattr(weight, "held", None)


def factor_of(weight: Float[Tensor, "O I"], dtype: torch.dtype, *, lasting: bool = False) -> Weight:
    """For products in this precision; one for all parts of a held sum."""
    held = held_of(weight)
    return Weight(weight, dtype, lasting=lasting) if held is None else held.to(dtype)


def gradient(
    held: Held | None, a: Float[Tensor, "O N"], b: Float[Tensor, "N I"]
) -> Float[Tensor, "O I"] | None:
    """What a backward pass returns for a weight whose gradient is ``a @ b``: nothing once it has
    been added to what is held."""
    total = a.new_zeros(len(a), b.shape[1]) if held is None else held.grad
    add_product(total, a, b)
    return total if held is None else None
