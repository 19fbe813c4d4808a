"""The divergence of ``peagle.train.loss`` on CUDA: a kernel for the target and one for the rows.

One program has one row, so all sums over it stay on the chip; in what ``torch.compile`` makes, most
of them are passes over [C, W] in memory. Triton comes with PyTorch for CUDA and only there: this
module is imported where a tensor on CUDA is met.

    known      reads the target's logits once. Every lane keeps the largest logit that it has met,
               where that was, and sums relative to it; the lanes are compared after the loop,
               since a comparison in every block would make all threads wait for one another.
    finish     reads logits and target in the same way; once more for ``alpha``, where it is asked
               for, since ``min(p, q)`` needs both sums; and once more for the gradient, which
               needs all sums and is written where the logits were. What is read again is found
               in the L2 cache: the programs that run at a time hold fewer rows than fit there.

Exponentials are relative to the largest logit, and ``p`` is divided by its own sum: an lse is
rounded by more the larger the logits are, and would scale a whole row by that.
"""

from collections.abc import Mapping
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from peagle.kernels.reference import Reference

LOSSES = frozenset(
    {"kl", "ce", "tv", "lk_hybrid"}
)  # other entries of the table take the plain form
LK_DECAY = tl.constexpr(3.0)  # that of train/loss.py, which is above this module
FLOOR = tl.constexpr(-(2.0**100))  # below all logits, the same in bf16, finite times zero
KNOWN_SHAPE = {"block": 1024, "num_warps": 8}
ROWS_SHAPE = {"block": 2048, "num_warps": 16}


class Known(NamedTuple):
    """The target's distribution at some positions: its logits, and what is known of them."""

    logits: Float[Tensor, "P W"]
    lse: Float[Tensor, " P"]  # log(sum(exp(logits)))
    neg_entropy: Float[Tensor, " P"]  # sum(p * log(p))
    label: Int[Tensor, " P"]  # argmax p


def known(logits: Float[Tensor, "P W"], ops: Reference) -> Known:
    """Statistics in float32 of logits in float32 or bf16."""
    assert logits.is_contiguous() and logits.dtype in (torch.float32, torch.bfloat16)
    positions, width = logits.shape
    lse = logits.new_empty(positions, dtype=torch.float32)
    target = Known(logits, lse, torch.empty_like(lse), torch.empty_like(lse, dtype=torch.int64))
    with torch.cuda.device_of(logits):
        _known[(positions,)](*target, width, **KNOWN_SHAPE)
    return target


def finish(
    logits: Float[Tensor, "C W"],
    target: Known,
    shared: Int[Tensor, " C"],
    weights: Float[Tensor, " C"] | None,
    mix: Mapping[str, float],
    with_grad: bool,
    ops: Reference,
) -> tuple[Float[Tensor, ""], Int[Tensor, " C"]]:
    """Summed loss of some rows and their first choices; the logits' gradient takes their place."""
    assert logits.stride(1) == 1 and logits.dtype in (torch.float32, torch.bfloat16)
    rows, width = logits.shape
    loss = logits.new_empty(rows, dtype=torch.float32)
    first = torch.empty_like(loss, dtype=torch.int64)
    shares = (float(mix.get(name, 0)) for name in ("kl", "ce", "tv", "lk_hybrid"))
    asked = {"with_kl": {"kl", "lk_hybrid"}, "with_ce": {"ce"}, "with_tv": {"tv", "lk_hybrid"}}
    flags = {flag: not names.isdisjoint(mix) for flag, names in asked.items()}
    flags["with_grad"] = with_grad
    tensors, stride = (logits, *target, shared, weights, loss, first), logits.stride(0)
    with torch.cuda.device_of(logits):
        _finish[(rows,)](*tensors, stride, width, *shares, **flags, **ROWS_SHAPE)
    return loss.sum(), first


# A type checker would put a function of its own in the place of the one that Triton compiles.


@triton.jit
@no_type_check
def _known(logits, lse, neg_entropy, label, width, block: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    lanes, none = tl.arange(0, block), tl.zeros([block], tl.float32)
    top, place, mass, moment = none + FLOOR, lanes, none, none
    for start in range(0, width, block):
        columns = start + lanes
        x = _load(logits + position * width, columns, width)
        rise, up, e = _rise(x, top)
        moment = tl.where(up, (moment - mass * rise) * e, moment + e * rise)
        mass = tl.where(up, mass * e + 1, mass + e)
        top, place = tl.where(up, x, top), tl.where(up, columns, place)
    most = tl.max(top, 0)
    e = tl.exp(top - most)
    total = tl.sum(mass * e, 0)
    centred = tl.sum((moment + mass * (top - most)) * e, 0) / total
    tl.store(lse + position, most + tl.log(total))
    tl.store(neg_entropy + position, centred - tl.log(total))
    tl.store(label + position, tl.min(tl.where(top == most, place, width), 0))


@triton.jit(do_not_specialize_on_alignment=["shared", "weights"])  # they may be slices
@no_type_check
def _finish(
    logits, targets, lse, neg_entropy, label, shared, weights, loss, first,
    stride, width, kl, ce, tv, lk, with_kl: tl.constexpr, with_ce: tl.constexpr,
    with_tv: tl.constexpr, with_grad: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(shared + row).to(tl.int64)
    logits += row * stride
    targets += position * width
    right, p_top = tl.load(label + position), tl.load(lse + position)
    hit = tl.load(logits + right).to(tl.float32)
    q_top, q_scale, p_scale, product, choice = _sums(
        logits, targets, p_top, hit, width, with_kl or with_tv, block
    )
    tl.store(first + row, choice)
    if weights is not None:
        weight = tl.load(weights + row).to(tl.float32)
        kl, ce, tv, lk = kl * weight, ce * weight, tv * weight, lk * weight
    total, sinking = 0.0, 0.0
    if with_tv:
        alpha, sinking = _overlap(logits, targets, q_top, q_scale, p_top, p_scale, width, block)
        blend = tl.exp(alpha * -LK_DECAY)
        kl, tv = kl + lk * blend, tv + lk * (1 - blend)
        total += tv * (1 - alpha)
    surprise = q_top - hit - tl.log(q_scale)  # -log(q[label])
    if with_kl:
        total += kl * (tl.load(neg_entropy + position) - product + surprise)
    if with_ce:
        total += ce * surprise
    tl.store(loss + row, total)
    if with_grad:
        for start in range(0, width, block):
            columns = start + tl.arange(0, block)
            q = tl.exp(_load(logits, columns, width) - q_top) * q_scale
            grad = q * (kl + ce)
            if with_kl or with_tv:
                p = tl.exp(_load(targets, columns, width) - p_top) * p_scale
                grad = grad - p * kl
                if with_tv:
                    grad += q * tv * (sinking - tl.where(q < p, 1.0, 0.0))
            if with_ce:
                grad -= tl.where(columns == right, ce, 0.0)
            tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=columns < width)


@triton.jit
@no_type_check
def _sums(logits, targets, p_top, hit, width, soft: tl.constexpr, block: tl.constexpr):
    """What makes ``q`` and ``p`` of exponentials; ``sum(p * (z - hit))``, relative to the label's
    logit so that large logits lose no digits; the first choice."""
    lanes, none = tl.arange(0, block), tl.zeros([block], tl.float32)
    top, place, q_mass, p_mass, product = none + FLOOR, lanes, none, none, none
    for start in range(0, width, block):
        columns = start + lanes
        z = _load(logits, columns, width)
        _, up, e = _rise(z, top)
        q_mass = tl.where(up, q_mass * e + 1, q_mass + e)
        top, place = tl.where(up, z, top), tl.where(up, columns, place)
        if soft:
            p = tl.exp(_load(targets, columns, width) - p_top)
            p_mass += p
            product += p * (z - hit)
    most = tl.max(top, 0)
    choice = tl.min(tl.where(top == most, place, width), 0)
    q_scale = 1 / tl.sum(q_mass * tl.exp(top - most), 0)
    p_scale = 1 / tl.sum(p_mass, 0) if soft else 0.0
    return most, q_scale, p_scale, tl.sum(product, 0) * p_scale, choice


@triton.jit
@no_type_check
def _overlap(logits, targets, q_top, q_scale, p_top, p_scale, width, block: tl.constexpr):
    """``sum(min(p, q))`` and ``sum(q[q < p])``."""
    alpha, sinking = tl.zeros([block], tl.float32), tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        columns = start + tl.arange(0, block)
        q = tl.exp(_load(logits, columns, width) - q_top) * q_scale
        p = tl.exp(_load(targets, columns, width) - p_top) * p_scale
        alpha += tl.minimum(p, q)
        sinking += tl.where(q < p, q, 0.0)
    return tl.sum(alpha, 0), tl.sum(sinking, 0)


@triton.jit
@no_type_check
def _load(row, columns, width):
    return tl.load(row + columns, mask=columns < width, other=FLOOR).to(tl.float32)


@triton.jit
@no_type_check
def _rise(x, top):
    """How far ``x`` is above the maximum so far, whether it is, and the smaller's share of the
    larger: one exponential for both cases."""
    rise = x - top
    return rise, rise > 0, tl.exp(-tl.abs(rise))
