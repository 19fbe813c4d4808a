"""The divergence of ``peagle.train.loss`` on CUDA: a kernel for the target and one for the rows.

One program has one row, so all sums over it stay on the chip; in what ``torch.compile`` makes, most
of them are passes over [C, W] in memory. Triton comes with PyTorch for CUDA and only there: this
module is imported where a tensor on CUDA is met.

    known      reads the target's logits once. Every lane keeps the largest logit that it has met,
               where that was, and a sum relative to it; the lanes are compared after the loop,
               since a comparison in every block would make all threads wait for one another.
    finish     reads logits and target for the sums that make ``p`` and ``q``; once more for
               ``alpha``, if a loss asks for it (else the compiler leaves the loop out); for the
               loss and the sum of its slopes; and for the gradient, which is written where the
               logits were. What is read again is found in the L2 cache: the programs that run at a
               time hold fewer rows than fit there.

What a loss is stands in ``train/loss.py`` alone: its ``value`` and ``slope`` are compiled into
``finish``.

Exponentials are relative to the largest logit and divided by their sum: an lse is rounded by more
the larger the logits are, and would scale a whole row by that.
"""

from collections.abc import Callable, Sequence
from functools import cache
from inspect import unwrap
from types import FunctionType
from typing import Any, NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from peagle.kernels.reference import Reference

FLOOR = tl.constexpr(-(2.0**100))  # below all logits, the same in bf16, finite times zero
KNOWN_SHAPE = {"block": 1024, "num_warps": 8}
ROWS_SHAPE = {"block": 2048, "num_warps": 16}


class Known(NamedTuple):
    """The target's distribution at some positions: its logits, and what is known of them."""

    logits: Float[Tensor, "P W"]
    top: Float[Tensor, " P"]  # the largest logit
    mass: Float[Tensor, " P"]  # sum(exp(logits - top))
    label: Int[Tensor, " P"]  # argmax p


def known(logits: Float[Tensor, "P W"], ops: Reference) -> Known:
    """Statistics in float32 of logits in float32 or bf16."""
    assert logits.is_contiguous() and logits.dtype in (torch.float32, torch.bfloat16)
    positions, width = logits.shape
    top, mass = logits.new_empty(2, positions, dtype=torch.float32)
    target = Known(logits, top, mass, torch.empty_like(top, dtype=torch.int64))
    with torch.cuda.device_of(logits):
        _known[(positions,)](*target, width, **KNOWN_SHAPE)
    return target


class Token(NamedTuple):
    """What the functions of a loss are called with: numbers of one token of one row."""

    p: Any
    q: Any
    log_p: Any
    log_q: Any
    hit: Any
    alpha: Any


def finish(
    logits: Float[Tensor, "C W"],
    target: Known,
    shared: Int[Tensor, " C"],
    weights: Float[Tensor, " C"] | None,
    terms: Sequence[tuple[Any, float]],
    with_grad: bool,
    ops: Reference,
) -> tuple[Float[Tensor, ""], Int[Tensor, " C"]]:
    """Summed loss of some rows and their first choices; the logits' gradient takes their place."""
    assert logits.stride(1) == 1 and logits.dtype in (torch.float32, torch.bfloat16)
    rows, width = logits.shape
    loss = logits.new_empty(rows, dtype=torch.float32)
    first = torch.empty_like(loss, dtype=torch.int64)
    values, slopes = (tuple(for_triton(entry[n]) for entry, _ in terms) for n in (0, 1))
    shares = tuple(share for _, share in terms)
    tensors, stride = (logits, *target, shared, weights, loss, first), logits.stride(0)
    with torch.cuda.device_of(logits):
        _finish[(rows,)](
            *tensors, stride, width, values, slopes, shares, with_grad=with_grad, **ROWS_SHAPE
        )
    return loss.sum(), first


@cache
def for_triton(function: Callable) -> Callable:
    """The same function with Triton's operations in the place of torch's, and so are those that it
    calls."""
    function = unwrap(function)  # a type checker may stand before it
    names: dict[str, Any] = {"torch": tl}
    for name in function.__code__.co_names:
        if isinstance(function.__globals__.get(name), FunctionType):
            names[name] = for_triton(function.__globals__[name])
    return triton.jit(FunctionType(function.__code__, function.__globals__ | names))


# A type checker would put a function of its own in the place of the one that Triton compiles.


@triton.jit
@no_type_check
def _known(logits, top, mass, label, width, block: tl.constexpr):
    position = tl.program_id(0).to(tl.int64)
    most, total, place = _softmax_sums(logits + position * width, width, block)
    tl.store(top + position, most)
    tl.store(mass + position, total)
    tl.store(label + position, place)


@triton.jit(do_not_specialize_on_alignment=["mass", "shared", "weights"])  # slices
@no_type_check
def _finish(
    logits, targets, top, mass, label, shared, weights, loss, first, stride, width,
    values, slopes, shares, with_grad: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(shared + row).to(tl.int64)
    logits += row * stride
    targets += position * width
    label += position
    p_top, p_mass = tl.load(top + position), tl.load(mass + position)
    q_top, q_mass, choice = _softmax_sums(logits, width, block)
    tl.store(first + row, choice)
    sums = (p_top, p_mass, q_top, q_mass)
    none = tl.zeros([block], tl.float32)
    overlap, value, slope = none, none, none
    for start in range(0, width, block):
        x = _token(logits, targets, label, start, width, sums, 0.0, block)
        overlap += tl.minimum(x.p, x.q)
    alpha = tl.sum(overlap, 0)
    for start in range(0, width, block):
        x = _token(logits, targets, label, start, width, sums, alpha, block)
        inside = start + tl.arange(0, block) < width
        value += tl.where(inside, _mixed(values, shares, x), 0.0)
        slope += tl.where(inside, _mixed(slopes, shares, x), 0.0)
    weight = 1.0
    if weights is not None:
        weight = tl.load(weights + row).to(tl.float32)
    tl.store(loss + row, tl.sum(value, 0) * weight)
    if with_grad:
        total = tl.sum(slope, 0)
        for start in range(0, width, block):
            x = _token(logits, targets, label, start, width, sums, alpha, block)
            grad = (_mixed(slopes, shares, x) - x.q * total) * weight
            columns = start + tl.arange(0, block)
            tl.store(logits + columns, grad.to(logits.dtype.element_ty), mask=columns < width)


@triton.jit
@no_type_check
def _softmax_sums(logits, width, block: tl.constexpr):
    """The largest logit, the sum of exponentials relative to it, and the first place of it."""
    lanes = tl.arange(0, block)
    top, place, mass = tl.zeros([block], tl.float32) + FLOOR, lanes, tl.zeros([block], tl.float32)
    for start in range(0, width, block):
        columns = start + lanes
        x = _load(logits, columns, width)
        e = tl.exp(-tl.abs(x - top))  # the smaller's share of the larger: for both cases
        mass = tl.where(x > top, mass * e + 1, mass + e)
        top, place = tl.maximum(x, top), tl.where(x > top, columns, place)
    most = tl.max(top, 0)
    mass = tl.sum(mass * tl.exp(top - most), 0)
    return most, mass, tl.min(tl.where(top == most, place, width), 0)


@triton.jit
@no_type_check
def _token(logits, targets, label, start, width, sums, alpha, block: tl.constexpr):
    """All that a loss may ask of a block of tokens; what none asks for the compiler leaves out."""
    p_top, p_mass, q_top, q_mass = sums
    columns = start + tl.arange(0, block)
    p_above = _load(targets, columns, width) - p_top
    q_above = _load(logits, columns, width) - q_top
    return Token(
        p=tl.exp(p_above) / p_mass,
        q=tl.exp(q_above) / q_mass,
        log_p=p_above - tl.log(p_mass),
        log_q=q_above - tl.log(q_mass),
        hit=tl.where(columns == tl.load(label), 1.0, 0.0),
        alpha=alpha,
    )


@triton.jit
@no_type_check
def _mixed(functions, shares, x):
    total = x.p * 0.0
    for n in tl.static_range(len(functions)):
        total += functions[n](x) * shares[n]
    return total


@triton.jit
@no_type_check
def _load(row, columns, width):
    return tl.load(row + columns, mask=columns < width, other=FLOOR).to(tl.float32)
