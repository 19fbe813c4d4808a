"""Divergence between target and drafter, fused with the draft head.

``p`` is the target's distribution and ``q`` the drafter's, both over the draft vocabulary, and
``alpha = sum(min(p, q))`` the chance that rejection sampling accepts the guess.

    kl         sum(p * log(p / q))                            the default
    ce         -log(q[argmax p])                              hard labels
    tv         1 - alpha                                      total variation distance
    lk_hybrid  lambda * kl + (1 - lambda) * tv,               arXiv 2602.23881;
               lambda = exp(-3 * alpha), held constant        kl early, acceptance late
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from peagle.kernels.cpu.onednn import ROW_UNIT, add_product
from peagle.kernels.grad_accumulation import at_least_float, factor_of, held_of
from peagle.kernels.products import compute_dtype

LOSSES = ("kl", "ce", "tv", "lk_hybrid")
LK_DECAY = 3.0
CHUNK_ROWS = 512  # logits exist for this many rows at a time
KERNEL_CHUNK_ROWS = 1024  # more: a GPU reads and writes the head's gradient for every chunk
CACHE_BYTES = 2**21  # of float32 logits that the many passes over them find in a CPU's cache
BLOCK = 128  # tokens per block in the search for the first choice


def check_mix(mix: Mapping[str, float]) -> dict[str, float]:
    """A weighted sum of losses, as given in a config.

    Raises:
        ValueError: for an unknown name, a negative weight, or no positive weight.
    """
    unknown = sorted(set(mix) - set(LOSSES))
    if unknown:
        raise ValueError(f"unknown loss {unknown[0]!r}: choose from {', '.join(LOSSES)}")
    if not mix or min(mix.values()) < 0 or max(mix.values()) == 0:
        raise ValueError(f"loss weights must not be negative and one must be positive, got {mix}")
    return {name: weight for name, weight in mix.items() if weight > 0}


@runtime_checkable
class Teacher(Protocol):
    """The target's logits, looked up or computed when asked for."""

    def __getitem__(self, position: Int[Tensor, " P"]) -> Float[Tensor, "P W"]: ...


def head_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "W D"],
    teacher: Teacher,
    position: Int[Tensor, " N"],
    *,
    mix: Mapping[str, float],
    weights: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, " N"]]:
    """Summed loss of ``N`` rows and the drafter's first choice in each.

    Args:
        hidden: last hidden states of the rows, normed.
        weight: the draft head.
        teacher: the target's logits, once per position (again where two chunks meet), shared by
            the rows that guess it.
        position: which position each row guesses; rows in any order. Best on the CPU: chunks are
            planned from it, and a GPU would be waited for.
        mix: weights of the losses (see ``check_mix``).
        weights: of the rows; default 1.

    Rows are taken by position, a chunk at a time, so that rows which guess the same token share
    the target's distribution of it. Gradients are taken in the same pass: no logits outlive their
    chunk, and memory never holds [N, W]. A part of a held sum must not scale this loss: the head's
    gradient is in its sum by then.
    """
    dtype = compute_dtype(hidden)
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(hidden.device.type, enabled=False):  # it would round sums of float32, too
        found = (teacher, position, dict(mix), weights)
        return _HeadLoss.apply(hidden, weight, dtype, needed, *found)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, dtype, needed, teacher, position, mix, weights):
        order = torch.argsort(position)
        position, order = position[order], order.to(hidden.device, non_blocking=True)
        states, head = whole_units(hidden[order].to(dtype)), factor_of(weight, dtype, lasting=True)
        total = states.new_zeros((), dtype=at_least_float(dtype))
        guess = torch.empty_like(order)
        grad_hidden = torch.empty_like(hidden) if needed else None
        ctx.held = held_of(weight) if needed else None
        if needed:
            grad_weight = torch.zeros_like(weight) if ctx.held is None else ctx.held.grad
        chunk_rows, at_positions, at_rows = steps(states)
        for rows in slices(len(order), chunk_rows):
            # The last chunk takes the zeros behind it along: they add nothing.
            chunk = rows if rows.stop < len(order) else slice(rows.start, len(states))
            count = rows.stop - rows.start
            known, shared = target_at(teacher, position[rows], states)
            target = at_positions(known)
            logits = head.product(states[chunk])
            for some in slices(count, cached_rows(logits)):
                lines = order[rows][some]
                share = None if weights is None else weights[lines].to(total.dtype)
                loss, guess[lines] = at_rows(logits[some], target, shared[some], share, mix, needed)
                total += loss
            if needed:
                grad_hidden[order[rows]] = head.product_back(logits)[:count].to(hidden.dtype)
                add_product(grad_weight, logits.T, states[chunk])
            del logits, known, target  # so that the next are given the same memory
        ctx.mark_non_differentiable(guess)
        if needed:
            ctx.save_for_backward(grad_hidden, *([grad_weight] if ctx.held is None else []))
        return total, guess

    @staticmethod
    def backward(ctx, grad_total, _):
        """Raises ``RuntimeError`` where the gradient that is held would have to be scaled; on CUDA
        the next call that waits for the GPU does."""
        if ctx.held is not None:
            torch._assert_async(
                grad_total == 1,
                "scale a held sum, not its parts: the head's gradient is added up",
            )
        # What is handed on is what was saved, so a second backward pass must raise, and does:
        # saved tensors have versions.
        for_hidden, *for_weight = (x.mul_(grad_total.to(x.dtype)) for x in ctx.saved_tensors)
        return for_hidden, *(for_weight or [None]), None, None, None, None, None, None


def whole_units(states: Float[Tensor, "N D"]) -> Float[Tensor, "N2 D"]:
    """With rows of zeros up to a number that oneDNN has made code for before."""
    extra = 0 if states.is_cuda else -len(states) % ROW_UNIT
    return F.pad(states, (0, 0, 0, extra)) if extra else states


def slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def cached_rows(logits: Float[Tensor, "C W"]) -> int:
    """How many rows to finish at a time: on a CPU what its cache holds, else all."""
    if logits.device.type != "cpu":
        return len(logits)
    return max(1, CACHE_BYTES // (4 * logits.shape[-1]))


def first_choice(logits: Float[Tensor, "C W"]) -> Int[Tensor, " C"]:
    """``logits.argmax(-1)``; on the CPU by block maxima, since ``argmax`` is not vectorised."""
    whole = logits.shape[-1] // BLOCK * BLOCK
    if logits.device.type != "cpu" or whole == 0:
        return logits.argmax(-1)
    blocks = logits[:, :whole].unflatten(-1, (-1, BLOCK))
    block = blocks.amax(-1).argmax(-1)
    rows = torch.arange(len(logits))
    inside = blocks[rows, block].argmax(-1)
    best = block * BLOCK + inside
    if whole < logits.shape[-1]:
        rest = logits[:, whole:].argmax(-1) + whole
        best = torch.where(logits[rows, rest] > logits[rows, best], rest, best)
    return best


class Target(NamedTuple):
    """The target's distribution at some positions."""

    p: Float[Tensor, "P W"]
    purity: Float[Tensor, " P"]  # sum(p * log(p))
    label: Int[Tensor, " P"]  # argmax p

    def of(self, which: Int[Tensor, " C"]) -> "Target":
        """One entry for each row that guesses one of the positions."""
        return Target(*(x.index_select(0, which) for x in self))


def target_at(
    teacher: Teacher, position: Int[Tensor, " C"], like: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "P W"], Int[Tensor, " C"]]:
    """The target's logits of each position once, and which of them every row guesses."""
    found = torch.unique_consecutive(position, return_inverse=True)
    distinct, shared = (x.to(like.device, non_blocking=True) for x in found)
    return teacher[distinct].to(at_least_float(like.dtype)), shared


def steps(x: Float[Tensor, "..."]) -> tuple[int, Callable[..., Any], Callable[..., Any]]:
    """Rows of a chunk, ``target_of`` and ``finish`` for where ``x`` is: on CUDA the latter are
    kernels, which other precisions have not."""
    if x.is_cuda and x.dtype in (torch.float32, torch.bfloat16):
        import peagle.kernels.cuda.loss as loss_kernel  # of Triton, which torch has on CUDA only

        return KERNEL_CHUNK_ROWS, loss_kernel.known, loss_kernel.finish
    return CHUNK_ROWS, target_of, finish


def target_of(logits: Float[Tensor, "P W"]) -> Target:
    p, label = torch.softmax(logits, -1), first_choice(logits)
    purity = torch.linalg.vecdot(p, logits) - log_sum_exp(logits, p, label)
    return Target(p, purity, label)


def log_sum_exp(
    logits: Float[Tensor, "C W"], softmax: Float[Tensor, "C W"], first: Int[Tensor, " C"]
) -> Float[Tensor, " C"]:
    """From a softmax that is there anyway; exact at the largest entry, which cannot underflow."""
    rows = torch.arange(len(first), device=first.device)
    return logits[rows, first] - softmax[rows, first].log()


def finish(
    logits: Float[Tensor, "C W"],
    target: Target,
    shared: Int[Tensor, " C"],
    weights: Float[Tensor, " C"] | None,
    mix: Mapping[str, float],
    with_grad: bool,
) -> tuple[Float[Tensor, ""], Int[Tensor, " C"]]:
    """Summed loss of some rows and their first choices; the logits' gradient takes their place."""
    exact = logits.to(target.p.dtype)
    first = first_choice(exact)
    loss, grad = divergence(
        target.of(shared), exact, first, mix=mix, weights=weights, with_grad=with_grad
    )
    if grad is not None:
        logits.copy_(grad)
    return loss, first


def divergence(
    target: Target,
    logits: Float[Tensor, "C W"],
    first: Int[Tensor, " C"],
    *,
    mix: Mapping[str, float],
    weights: Float[Tensor, " C"] | None,
    with_grad: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "C W"] | None]:
    """Summed loss of a chunk, each row by its weight, and its gradient with respect to the logits.

    For a loss ``f(q)`` the gradient is ``q * (f'(q) - sum(q * f'(q)))``; that of ``kl`` is
    ``q - p`` and that of ``tv``, where ``f'(q) = -[q < p]``, is ``q * (sum(q[q < p]) - [q < p])``.
    ``kl`` itself is ``sum(p log p) - sum(p * logits) + log_sum_exp(logits)``: no logarithm of
    [C, W] is ever taken.
    """
    p, q = target.p, torch.softmax(logits, -1)
    norm = log_sum_exp(logits, q, first)
    every = torch.ones_like(norm) if weights is None else weights
    kl_share, tv_share, ce_share = (every * mix.get(name, 0.0) for name in ("kl", "tv", "ce"))
    total, below = norm.new_zeros(()), None
    if "tv" in mix or "lk_hybrid" in mix:
        alpha = torch.minimum(p, q).sum(-1)
        if "lk_hybrid" in mix:
            blend = torch.exp(-LK_DECAY * alpha)
            kl_share += every * mix["lk_hybrid"] * blend
            tv_share += every * mix["lk_hybrid"] * (1 - blend)
        total += (tv_share * (1 - alpha)).sum()
        below = q < p
    if "kl" in mix or "lk_hybrid" in mix:
        total += (kl_share * (target.purity - torch.linalg.vecdot(p, logits) + norm)).sum()
    if "ce" in mix:
        rows = torch.arange(len(norm), device=norm.device)
        total += (ce_share * (norm - logits[rows, target.label])).sum()
    if not with_grad:
        return total, None
    if set(mix) == {"kl"}:
        grad = q.sub_(p)
        plain = weights is None and mix["kl"] == 1
        return total, grad if plain else grad.mul_(kl_share[:, None])
    return total, slope(target, q, below, kl_share, tv_share, ce_share if "ce" in mix else None)


def slope(
    target: Target,
    q: Float[Tensor, "C W"],
    below: Bool[Tensor, "C W"] | None,
    kl_share: Float[Tensor, " C"],
    tv_share: Float[Tensor, " C"],
    ce_share: Float[Tensor, " C"] | None,
) -> Float[Tensor, "C W"]:
    """Gradient of a mix with respect to the logits, in the memory of ``q``."""
    factor = (kl_share if ce_share is None else kl_share + ce_share)[:, None]
    if below is not None:
        sinking = q * below
        factor = factor + tv_share[:, None] * (sinking.sum(-1, keepdim=True) - below.to(q.dtype))
    q = q.mul_(factor).sub_(target.p * kl_share[:, None])
    if ce_share is not None:
        rows = torch.arange(len(q), device=q.device)
        q[rows, target.label] -= ce_share
    return q


def global_mean(total: Float[Tensor, ""], count: int | float) -> Float[Tensor, ""]:
    """``total`` over the number (or weight) of the rows of all ranks, so that a row counts the same
    wherever it lies.

    Data-parallel training averages gradients over ranks; the factor of the world size undoes it.
    """
    everywhere = torch.full((), float(max(count, 1)), device=total.device)
    world = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(everywhere)
        world = dist.get_world_size()
    return total * (world / everywhere)
