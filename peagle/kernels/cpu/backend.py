"""The CPU: few passes over memory, pieces that its cache holds, and oneDNN where it is faster."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peagle.cod.sampling import Rows
from peagle.kernels.accelerated import Accelerated
from peagle.kernels.cpu.attention import mtp_attention, ntp_attention
from peagle.kernels.cpu.attention_tiles import Tiling, tile_rollouts
from peagle.kernels.cpu.products import FAST_BF16, ROW_UNIT, add_product, prefers_onednn, product
from peagle.kernels.cpu.rms_norm import rms_norm
from peagle.kernels.feed_forward import gate_up, gate_up_backward
from peagle.kernels.precision import at_least_float32

LONG = 1024  # slots from which on attention is faster in bf16, where the CPU has products of it
CACHE_ELEMENTS = 2**18  # of one tensor, so that a CPU's cache holds all tensors of a pass
CACHE_BYTES = 2**21  # of float32 logits that the many passes over them find in a CPU's cache
BLOCK = 128  # tokens per block in the search for the first choice


def turn(
    x: Float[Tensor, "#T A E"], cos: Float[Tensor, "T 1 F"], sin: Float[Tensor, "T 1 F"]
) -> Float[Tensor, "T A E"]:
    """The rotation, written straight into its result."""
    x = x.to(cos.dtype)
    first, second = x.chunk(2, -1)
    out = x.new_empty(len(cos), *x.shape[1:])
    low, high = out.chunk(2, -1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return out


def by_rows(function: Callable[..., None]) -> Callable[..., None]:
    """``function``, on as many rows of its tensors at a time as a cache holds."""

    def run(*tensors: Tensor) -> None:
        count = max(1, CACHE_ELEMENTS // tensors[0].shape[1])
        for rows in zip(*(x.split(count) for x in tensors), strict=True):
            function(*rows)

    return run


class Cpu(Accelerated):
    """Overrides what PyTorch's CPU kernels are slow at."""

    row_unit = ROW_UNIT
    product = staticmethod(product)
    add_product = staticmethod(add_product)
    rms_norm = staticmethod(rms_norm)
    ntp_attention = staticmethod(ntp_attention)
    turn = staticmethod(turn)
    gate_up = staticmethod(by_rows(gate_up))
    gate_up_backward = staticmethod(by_rows(gate_up_backward))

    def prefers_product(self, x: Float[Tensor, "T I"], weight: Float[Tensor, "O I"]) -> bool:
        return prefers_onednn(x, weight) and not torch.is_autocast_enabled("cpu")

    def attention_dtype(
        self, hidden: Float[Tensor, "S D"], document_lengths: list[int]
    ) -> torch.dtype:
        """bf16 for long documents on a processor that multiplies it; else float32 or better."""
        if hidden.dtype == torch.bfloat16 and FAST_BF16 and max(document_lengths) >= LONG:
            return hidden.dtype
        return at_least_float32(hidden.dtype)

    def plan_mtp_attention(
        self, rows: Rows, document: Int[Tensor, " S"], *, value: Float[Tensor, "S G E"]
    ) -> Tiling:
        return tile_rollouts(rows, document)

    def mtp_attention(
        self,
        query: Float[Tensor, "M A E"],
        key: Float[Tensor, "M G E"],
        value: Float[Tensor, "M G E"],
        ntp_key: Float[Tensor, "S G E"],
        ntp_value: Float[Tensor, "S G E"],
        *,
        plan: Tiling,
    ) -> Float[Tensor, "M A E"]:
        main_grads = [self.main_grads.of(x) for x in (ntp_key, ntp_value)]
        return mtp_attention(query, key, value, ntp_key, ntp_value, plan, main_grads)

    def first_choice(self, logits: Float[Tensor, "C W"]) -> Int[Tensor, " C"]:
        """By block maxima, since ``argmax`` is not vectorised."""
        whole = logits.shape[-1] // BLOCK * BLOCK
        if whole == 0:
            return logits.argmax(-1)
        blocks = logits[:, :whole].unflatten(-1, (-1, BLOCK))
        block = blocks.amax(-1).argmax(-1)
        rows = torch.arange(len(logits))
        best = block * BLOCK + blocks[rows, block].argmax(-1)
        if whole < logits.shape[-1]:
            rest = logits[:, whole:].argmax(-1) + whole
            best = torch.where(logits[rows, rest] > logits[rows, best], rest, best)
        return best

    def loss_rows(self, logits: Float[Tensor, "C W"]) -> int:
        return max(1, CACHE_BYTES // (4 * logits.shape[-1]))

    def pad_rows(self, states: Float[Tensor, "N D"]) -> Float[Tensor, "N2 D"]:
        extra = -len(states) % ROW_UNIT
        return torch.nn.functional.pad(states, (0, 0, 0, extra)) if extra else states
