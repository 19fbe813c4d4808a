"""Matrix products without gradients; of float32 on the CPU by the faster of torch's two libraries.

torch gives float32 products to MKL, which on AMD's processors does without AVX-512. oneDNN, which
torch has for bf16, does not: it is somewhat faster on family 25 (Zen 4), and twice as fast on 26
(Zen 5), whose units are 512 bits wide; LOG.md has the rates. Both compute in float32 and differ in
rounding only.

oneDNN and its wrapper keep the code that they made for the last 1,024 shapes each. Every step has
numbers of rows of its own, so that most of it is never used again: on the quickstart it grew to a
gigabyte. Both read their limits from the environment when they are first used.
"""

import os
import re
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

# As many as a layer of a segment has, forward and back, so that the layers share them; what a user
# has set stays.
CACHE_LIMITS = {
    name: "48"
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    if name not in os.environ
}
os.environ.update(CACHE_LIMITS)

ROW_UNIT = 64  # rows come in multiples of it where they can be chosen, so that kinds are few
FEW = 32  # rows below which laying out the weight costs oneDNN more than it gains
FAST = torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_supported()


def wide_amd(cpuinfo: str) -> bool:
    """Whether Linux describes a processor of AMD's with units of 512 bits: family 26 (Zen 5) or
    later."""
    family = re.search(r"^vendor_id\s*: AuthenticAMD\ncpu family\s*: (\d+)$", cpuinfo, re.MULTILINE)
    return family is not None and int(family[1]) >= 26


CPUINFO = Path("/proc/cpuinfo")
# Whether MKL is to be avoided altogether. On family 25 (Zen 4) it is as fast in the gradient of a
# weight, which it adds up as it goes, and the attention kernel that calls it is the faster one.
SLOW_MKL = FAST and CPUINFO.exists() and wide_amd(CPUINFO.read_text())

# Of a product that is made before it is added, this much exists at a time: whichever is more.
BLOCK_ROWS = 1024
BLOCK_ELEMENTS = 2**20


def suits(x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]) -> bool:
    exact = x.dtype == weight.dtype == torch.float32
    enough = len(x) >= FEW and x.shape[1] > 0  # it has no code for sums of nothing
    return FAST and exact and enough and x.device.type == "cpu"


def plain_product(x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]) -> Float[Tensor, "T O"]:
    """``x @ weight.T``, without gradients."""
    if suits(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, dense(weight), None, "none", [], "")
    return x @ weight.T


def plain_products(a: Float[Tensor, "G M K"], b: Float[Tensor, "G K N"]) -> Float[Tensor, "G M N"]:
    """``a @ b``; of a single head by ``plain_product``, which has no form for several."""
    return plain_product(a[0], b[0].T)[None] if len(a) == 1 else a @ b


def dense(weight: Float[Tensor, "O I"]) -> Float[Tensor, "O I"]:
    """Without gaps, in the order that it has: of what has gaps oneDNN's product takes seconds."""
    return weight.contiguous() if weight.stride(-1) == 1 else weight.T.contiguous().T


def add_product(
    total: Float[Tensor, "O I"], a: Float[Tensor, "O N"], b: Float[Tensor, "N I"]
) -> None:
    """``total += a @ b``, a weight's gradient, summed in the precision of ``total``.

    MKL adds as it goes, unless it is slow. oneDNN lays out both factors anew, but only its weight
    in parallel: that is the wider one.
    """
    if total.is_cuda and a.dtype != total.dtype:
        # Its library adds to float32 what it multiplied in bf16.
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
        return
    wide = len(a) > b.shape[1] and suits(b.T, a)
    if a.dtype == total.dtype and not (SLOW_MKL and (wide or suits(a, b.T))):
        total.addmm_(a, b)
        return
    rows = max(BLOCK_ROWS, BLOCK_ELEMENTS // total.shape[1])
    for into, some in zip(total.split(rows), a.split(rows), strict=True):
        into += plain_product(b.T, some).T if wide else plain_product(some, b.T)
