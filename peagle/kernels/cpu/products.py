"""Matrix products without gradients, in float32 by the faster of torch's two libraries.

torch gives float32 products to MKL, which does without AVX-512 on AMD's processors. oneDNN, which
torch has for bf16, does not. One rule serves every processor: oneDNN where there is AVX-512, else
torch's own choice. On AMD family 26 (Zen 5) oneDNN is twice as fast, on family 25 (Zen 4) somewhat
faster (docs/log.md, 2026-11-28). Both compute in float32 and differ in rounding only. Gradients of
weights are MKL's everywhere, since it adds as it goes.
"""

import torch
from jaxtyping import Float
from torch import Tensor

ROW_UNIT = 64  # rows come in multiples of it where they can be chosen, so that shapes are few
FEW = 32  # rows below which oneDNN loses more by its layout of the weight than it gains
ONEDNN = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()
FAST_BF16 = torch.cpu._is_avx512_bf16_supported()  # also true of every processor with AMX

# Of a product that is made before it is added, this much exists at a time: whichever is more.
BLOCK_ROWS = 1024
BLOCK_ELEMENTS = 2**20


def prefers_onednn(x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]) -> bool:
    exact = x.dtype == weight.dtype == torch.float32
    return ONEDNN and exact and len(x) >= FEW and x.shape[1] > 0  # it has no sums of nothing


def product(x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "T O"]:
    """``x @ weight.T``"""
    if prefers_onednn(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, without_gaps(weight), None, "none", [], "")
    return x @ weight.T


def without_gaps(weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
    """In the order that it has: of a weight with gaps oneDNN's product takes seconds."""
    return weight.contiguous() if weight.stride(-1) == 1 else weight.T.contiguous().T


def add_product(
    total: Float[Tensor, "O I"], a: Float[Tensor, "O N"], b: Float[Tensor, "N I"]
) -> None:
    """``total += a @ b``, a weight's gradient, summed in the precision of ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)  # by MKL, which adds as it goes
        return
    rows = max(BLOCK_ROWS, BLOCK_ELEMENTS // total.shape[1])
    for into, some in zip(total.split(rows), a.split(rows), strict=True):
        into += some @ b
