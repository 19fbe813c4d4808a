"""CUDA: FlexAttention and cuDNN, Triton kernels for the loss, compiled elementwise work."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from peagle.cod.sampling import Rows
from peagle.kernels.accelerated import Accelerated
from peagle.kernels.cuda.compiled import fused
from peagle.kernels.cuda.cudnn_attention import UNIT_SLOTS, is_supported
from peagle.kernels.cuda.flex_attention import FlexPlan, flex_mtp_attention, plan_flex
from peagle.kernels.feed_forward import gate_up, gate_up_backward

LONG = 2048  # slots of a document from which on cuDNN is worth its preparation
UNPREPARED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
PREPARED = [SDPBackend.CUDNN_ATTENTION, *UNPREPARED]


@fused
def turn(
    x: Float[Tensor, "#T A E"], cos: Float[Tensor, "T 1 F"], sin: Float[Tensor, "T 1 F"]
) -> Float[Tensor, "T A E"]:
    """The rotation in one kernel."""
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Cuda(Accelerated):
    """Few kernels, few shapes, and no wait for the GPU within a step."""

    row_unit = 64
    turn = staticmethod(turn)
    gate_up = staticmethod(fused(gate_up))
    gate_up_backward = staticmethod(fused(gate_up_backward))
    head_chunk = 1024  # more rows: a GPU reads and writes the head's gradient for every chunk

    def rms_norm(
        self, x: Float[Tensor, "*T D"], weight: Float[Tensor, " D"], eps: float
    ) -> Float[Tensor, "*T D"]:
        """The fused kernel wants the weight in the precision of its input."""
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)

    def ntp_attention(
        self,
        query: Float[Tensor, "S A E"],
        key: Float[Tensor, "S G E"],
        value: Float[Tensor, "S G E"],
        *,
        document_lengths: list[int],
    ) -> Float[Tensor, "S A E"]:
        documents = zip(*(x.split(document_lengths) for x in (query, key, value)), strict=True)
        return torch.cat([causal_attention(*document) for document in documents])

    def plan_mtp_attention(
        self, rows: Rows, document: Int[Tensor, " S"], *, value: Float[Tensor, "S G E"]
    ) -> FlexPlan:
        return plan_flex(rows, document, device=value.device, cudnn=is_supported(value))

    def mtp_attention(
        self,
        query: Float[Tensor, "M A E"],
        key: Float[Tensor, "M G E"],
        value: Float[Tensor, "M G E"],
        ntp_key: Float[Tensor, "S G E"],
        ntp_value: Float[Tensor, "S G E"],
        *,
        plan: FlexPlan,
    ) -> Float[Tensor, "M A E"]:
        return flex_mtp_attention(query, key, value, ntp_key, ntp_value, plan=plan)

    def add_product(
        self, total: Float[Tensor, "O I"], a: Float[Tensor, "O N"], b: Float[Tensor, "N I"]
    ) -> None:
        """cuBLAS adds to float32 what it multiplied in bf16."""
        if a.dtype == total.dtype:
            total.addmm_(a, b)
        else:
            torch.addmm(total, a, b, out_dtype=total.dtype, out=total)

    def fused_loss(self, dtype: torch.dtype) -> tuple[Callable, Callable] | None:
        if dtype not in (torch.float32, torch.bfloat16):
            return None
        from peagle.kernels.cuda import loss  # of Triton, which torch has on CUDA only

        return loss.known, loss.finish


def causal_attention(
    query: Float[Tensor, "s A E"], key: Float[Tensor, "s G E"], value: Float[Tensor, "s G E"]
) -> Float[Tensor, "s A E"]:
    """One document: by cuDNN if it is long, in one of few lengths, which cuDNN prepares for."""
    length, shared = len(query), query.shape[1] // key.shape[1]
    prepared = is_supported(value) and length > LONG
    kernels = PREPARED if prepared else UNPREPARED
    if value.dtype == torch.float32:  # of the kernels that share keys, none is for float32
        key, value, shared = *(x.repeat_interleave(shared, 1) for x in (key, value)), 1
    states = (query, key, value)
    if prepared and length % UNIT_SLOTS:
        states = (F.pad(x, (0, 0, 0, 0, 0, -length % UNIT_SLOTS)) for x in states)
    states = (x.transpose(0, 1)[None] for x in states)
    with sdpa_kernel(kernels, set_priority=True):
        context = F.scaled_dot_product_attention(*states, is_causal=True, enable_gqa=shared > 1)
    return context[0].transpose(0, 1)[:length]
