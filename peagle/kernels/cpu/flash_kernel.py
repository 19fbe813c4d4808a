"""torch's flash kernel for the CPU: in which precision, and with which rows at once."""

import torch
from jaxtyping import Float
from torch import Tensor

from peagle.kernels.cpu.gemm_attention import precise, stacked, unstacked
from peagle.kernels.cpu.onednn import SLOW_MKL

MANY = 768  # rows from which on the kernel takes 256 at a time, instead of 64 or 32
LONG = 1024  # slots from which on bf16 is faster, for a CPU with bf16 but without matrix tiles
MATRIX_TILES = torch.cpu._is_amx_tile_supported()
BF16 = torch.cpu._is_avx512_bf16_supported()

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def attend(
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "R G S E"],
    value: Float[Tensor, "R G S E"],
    *,
    mask: Float[Tensor, "T S"] | None = None,
    causal: bool = False,
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "R G T"]]:
    """What the rows attend to, and the log-sum-exp of their scores."""
    query, key, value = suited(query, key, value)
    many = query.shape[2] >= MANY  # not so in the backward pass: key and value are summed up there
    if causal or many or not worth_stacking(query):
        return flash(query, key, value, 0.0, causal, attn_mask=mask)
    inputs = (stacked(query)[None], key[:1], value[:1])
    out, norm = flash(*inputs, 0.0, False, attn_mask=of_all(mask, query))
    return unstacked(out[0], query), unstacked(norm[0], query)


def attend_backward(
    grad: Float[Tensor, "R G T E"],
    query: Float[Tensor, "R G T E"],
    key: Float[Tensor, "R G S E"],
    value: Float[Tensor, "R G S E"],
    out: Float[Tensor, "R G T E"],
    norm: Float[Tensor, "R G T"],
    *,
    mask: Float[Tensor, "T S"] | None = None,
    causal: bool = False,
) -> tuple[Float[Tensor, "R G T E"], Float[Tensor, "#R G S E"], Float[Tensor, "#R G S E"]]:
    """Gradients of query, key and value; the latter two of all heads together, or of each."""
    grad, query, key, value, out, norm = suited(grad, query, key, value, out, norm)
    if causal or not worth_stacking(query):
        return flash_backward(grad, query, key, value, out, norm, 0.0, causal, attn_mask=mask)
    onward, rows, before, sums = (stacked(x)[None] for x in (grad, query, out, norm))
    inputs = (onward, rows, key[:1], value[:1], before, sums)
    found = flash_backward(*inputs, 0.0, False, attn_mask=of_all(mask, query))
    return unstacked(found[0][0], query), *found[1:]


def suited(*inputs: Float[Tensor, "..."]) -> list[Float[Tensor, "..."]]:
    """In float32 for a CPU on which the kernel is slower in bf16."""
    return [x if MATRIX_TILES else x.to(precise(x)) for x in inputs]


def worth_stacking(query: Float[Tensor, "R G T E"]) -> bool:
    """Whether heads that share keys go through as rows of one: the kernel is faster with more
    rows, but its backward pass takes the heads in parallel."""
    return len(query) > 1 and query.shape[1] >= torch.get_num_threads()


def of_all(mask: Tensor | None, query: Float[Tensor, "R G T E"]) -> Tensor | None:
    """The mask of rows that are stacked."""
    return None if mask is None else mask.repeat(len(query), 1)


def by_products(query: Float[Tensor, "..."]) -> bool:
    """Whether products (``unmasked.py``) are faster than the kernel where nothing is masked.

    The kernel calls MKL, and takes matrix tiles for bf16 where there are any.
    """
    faster = {torch.bfloat16: BF16, torch.float32: SLOW_MKL}
    return faster.get(query.dtype, False) and not MATRIX_TILES


def fast_dtype(dtype: torch.dtype, longest: int) -> torch.dtype:
    """Precision of queries and keys that is fastest for documents of up to ``longest`` slots."""
    if dtype == torch.bfloat16 and (MATRIX_TILES or (BF16 and longest >= LONG)):
        return dtype
    return torch.promote_types(dtype, torch.float32)
