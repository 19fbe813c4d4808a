"""What the CPU and CUDA have in common: fewer passes, less memory, gradients added by products."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from peagle.kernels.feed_forward import feed_forward
from peagle.kernels.linear import linear
from peagle.kernels.precision import compute_dtype
from peagle.kernels.reference import Angles, Reference
from peagle.kernels.rotary import rotate


class Accelerated(Reference):
    """Subclasses supply the elementwise operations."""

    turn: Callable[[Tensor, Tensor, Tensor], Tensor]  # the rotation without its gradient
    gate_up: Callable[..., None]
    gate_up_backward: Callable[..., None]

    def prefers_product(self, x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]) -> bool:
        """Whether ``product`` is faster than torch's own linear layer."""
        return False

    def linear(
        self,
        x: Float[Tensor, "T I"],
        weight: Float[Tensor, "O I"],
        bias: Float[Tensor, " O"] | None = None,
    ) -> Float[Tensor, "T O"]:
        accumulates = self.main_grads.of(weight) is not None
        ours = accumulates and compute_dtype(x) == compute_dtype(weight)
        if not (ours or self.prefers_product(x, weight)):
            return super().linear(x, weight, bias)
        out = linear(x, weight, self)
        return out if bias is None else out + bias

    def rotate(self, x: Float[Tensor, "#T A E"], angles: Angles) -> Float[Tensor, "T A E"]:
        return rotate(x, *angles, self.turn)

    def feed_forward(
        self,
        x: Float[Tensor, "T D"],
        gate: Float[Tensor, "I D"],
        up: Float[Tensor, "I D"],
        down: Float[Tensor, "D I"],
    ) -> Float[Tensor, "T D"]:
        if not torch.is_grad_enabled():
            return super().feed_forward(x, gate, up, down)
        return feed_forward(x, gate, up, down, self, (self.gate_up, self.gate_up_backward))
