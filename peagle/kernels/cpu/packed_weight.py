"""A weight that rows are multiplied by, forward and back, without gradients.

oneDNN reads a weight in an order of its own, and lays it out anew for every product. One that
serves many products of a step is laid out once for each direction, which makes them some per cent
faster, those of few rows most (LOG.md, 2026-11-29).
"""

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from peagle.kernels.cpu.onednn import FAST, plain_product

# Precisions in which oneDNN is the fastest that torch has on this processor.
FASTEST = {torch.float32: FAST, torch.bfloat16: FAST and torch.cpu._is_avx512_bf16_supported()}


class Weight:
    """Multiplies rows by a weight, in one precision."""

    def __init__(self, weight: Float[Tensor, "O I"], dtype: torch.dtype, *, lasting: bool = False):
        """``lasting``: for many products; what they need is kept, at most twice its memory."""
        on_cpu = weight.device.type == "cpu" and weight.numel() > 0
        self.lays_out = lasting and on_cpu and FASTEST.get(dtype, False)
        cast_once = lasting and not self.lays_out
        self.weight = weight.detach().to(dtype) if cast_once else weight.detach()
        self.dtype = dtype

    def product(self, x: Float[Tensor, "T I"]) -> Float[Tensor, "T O"]:
        """``x @ weight.T``"""
        if self.lays_out:
            return laid_product(x, self.for_product)
        return plain_product(x, self.plain)

    def product_back(self, grad: Float[Tensor, "T O"]) -> Float[Tensor, "T I"]:
        """``grad @ weight``"""
        if self.lays_out:
            return laid_product(grad, self.for_product_back)
        return plain_product(grad, self.plain.T)

    @property
    def plain(self) -> Float[Tensor, "O I"]:
        return self.weight.to(self.dtype)

    @cached_property
    def for_product(self) -> Tensor:
        return laid_out(self.plain)

    @cached_property
    def for_product_back(self) -> Tensor:
        return laid_out(self.plain.T)


def laid_out(weight: Float[Tensor, "O I"]) -> Tensor:
    """In oneDNN's order, which nothing but its products can read."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())


def laid_product(x: Float[Tensor, "T I"], weight: Tensor) -> Float[Tensor, "T O"]:
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
