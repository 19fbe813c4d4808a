"""Back-propagates each piece at once and accumulates its gradients.

Only one piece's activations are alive at a time. Gradients are added to one sum per tensor as soon
as they are computed, a weight's by the matrix product itself (Megatron's ``main_grad``), so that no
piece makes a copy of all of them.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from peagle.kernels.device import without_autocast
from peagle.kernels.precision import at_least_float32


class MainGrads:
    """One sum of gradients per tensor, in float32 or better so that pieces are rounded once."""

    def __init__(self, tensors: Sequence[Tensor]):
        self.tensors = tensors
        # Zeros, not None: DDP waits for every parameter, and a draw may leave one unused.
        self.sums = [torch.zeros_like(x, dtype=at_least_float32(x.dtype)) for x in tensors]
        self._sum_of = {id(x): found for x, found in zip(tensors, self.sums, strict=True)}
        self._casts: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor | None:
        """The sum of a tensor's gradients; ``None`` for a tensor that has none here."""
        return self._sum_of.get(id(tensor))

    def cast(self, weight: Float[Tensor, "O I"], dtype: torch.dtype) -> Float[Tensor, "O I"]:
        """The weight in this precision, without gradients: cast once for all pieces."""
        if self.of(weight) is None or weight.dtype == dtype:
            return weight.detach().to(dtype)
        known = self._casts.get(id(weight))
        if known is None or known.dtype != dtype:
            known = self._casts[id(weight)] = weight.detach().to(dtype)
        return known

    @contextmanager
    def collecting(self) -> Iterator[None]:
        """Add every gradient that autograd finds for one of the tensors to its sum.

        The hook returns an expanded zero, because ``autograd.grad`` keeps what it finds until its
        end.
        """

        def add(total: Tensor, grad: Tensor | None) -> Tensor | None:
            if grad is None:
                return None
            total.add_(grad)
            return grad.new_zeros(()).expand_as(grad)

        pairs = zip(self.tensors, self.sums, strict=True)
        handles = [x.register_hook(partial(add, total)) for x, total in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


PieceLoss = Callable[[Any, MainGrads], Tensor]


def accumulate(
    pieces: Sequence[PieceLoss], shared: Any, parameters: Sequence[Tensor]
) -> Float[Tensor, ""]:
    """``sum(piece(shared, main_grads) for piece in pieces)``, one piece in memory at a time.

    Each piece is back-propagated as soon as it is computed. What remains are the summed gradients
    of ``shared`` (tensors in tuples) and of ``parameters``, handed out when the result is
    differentiated. Do not rescale a piece's loss: the head's gradient is already accumulated.
    """
    tensors, form = tree_flatten(shared)
    leaves = [x.detach().requires_grad_() for x in tensors]
    main_grads = MainGrads([*leaves, *parameters])
    with main_grads.collecting():
        return _Accumulate.apply(
            pieces, tree_unflatten(leaves, form), main_grads, *tensors, *parameters
        )


class _Accumulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pieces, shared, main_grads, *inputs):
        ctx.dtypes = [x.dtype for x in inputs]
        total = torch.zeros((), dtype=torch.float32, device=inputs[0].device)
        for piece in pieces:
            with torch.enable_grad():
                loss = piece(shared, main_grads)
            # loss.backward() runs outside autocast: what a backward pass has in float32, it must
            # not round.
            with without_autocast(loss.device):
                torch.autograd.grad(loss, main_grads.tensors, allow_unused=True)
            total = total + loss.detach()
        ctx.save_for_backward(*main_grads.sums)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        scaled = (grad.mul_(grad_total.to(grad.dtype)) for grad in ctx.saved_tensors)
        return None, None, None, *(x.to(dtype) for x, dtype in zip(scaled, ctx.dtypes, strict=True))
