"""Divergence between target and drafter, fused with the draft head.

``p`` is the target's distribution and ``q`` the drafter's, both over the draft vocabulary, and
``alpha = sum(min(p, q))`` the chance that rejection sampling accepts the guess.

    kl         sum(p * log(p / q))                            the default
    ce         -log(q[argmax p])                              hard labels
    tv         1 - alpha                                      total variation distance
    lk_hybrid  lambda * kl + (1 - lambda) * tv,               arXiv 2602.23881;
               lambda = exp(-3 * alpha), held constant        kl early, acceptance late

To add a loss, write its value and its slope and add one line to ``LOSSES``. Both forms of the loss
use that entry: the one here, and on CUDA the Triton kernels of ``kernels/cuda/loss.py``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peagle.kernels.device import without_autocast
from peagle.kernels.precision import at_least_float32, compute_dtype
from peagle.kernels.reference import Reference


class Target(NamedTuple):
    """The target's distribution at some positions."""

    p: Float[Tensor, "P W"]
    logits: Float[Tensor, "P W"]
    lse: Float[Tensor, " P"]  # log(sum(exp(logits)))
    neg_entropy: Float[Tensor, " P"]  # sum(p * log(p))
    label: Int[Tensor, " P"]  # argmax p


@dataclass
class RowStats:
    """What losses are made of, in every row of a chunk: each is computed when first asked for."""

    target: Target
    shared: Int[Tensor, " C"]  # which position each row guesses
    logits: Float[Tensor, "C W"]
    first: Int[Tensor, " C"]  # argmax of the logits

    @cached_property
    def p(self) -> Float[Tensor, "C W"]:
        return self.target.p.index_select(0, self.shared)

    @cached_property
    def log_p(self) -> Float[Tensor, "C W"]:
        lse = self.target.lse[self.shared]
        return self.target.logits.index_select(0, self.shared).sub_(lse[:, None])

    @cached_property
    def q(self) -> Float[Tensor, "C W"]:
        return torch.softmax(self.logits, -1)

    @cached_property
    def lse(self) -> Float[Tensor, " C"]:
        """log(sum(exp(logits)))"""
        return log_sum_exp(self.logits, self.q, self.first)

    @cached_property
    def log_q(self) -> Float[Tensor, "C W"]:
        return self.logits - self.lse[:, None]

    @cached_property
    def hit(self) -> Float[Tensor, "C W"]:
        """1 at the target's first choice, else 0."""
        label = self.target.label[self.shared]
        return torch.zeros_like(self.logits).scatter_(1, label[:, None], 1.0)

    @cached_property
    def alpha(self) -> Float[Tensor, "C 1"]:
        """Chance that rejection sampling accepts the guess."""
        return torch.minimum(self.p, self.q).sum(-1, keepdim=True)


class Loss(NamedTuple):
    """One divergence between ``p`` and ``q``, token by token of the draft vocabulary.

    Both functions take an ``x`` with ``p``, ``q``, ``log_p``, ``log_q``, ``hit`` (1 at the target's
    first choice, else 0) and ``alpha`` of the row. Triton compiles them as well, so they consist of
    arithmetic, calls of each other, and what torch and ``triton.language`` both have (``exp log
    where maximum``), written ``torch.exp``. They must be finite where ``p`` and ``q`` are 0.

    ``value`` is summed over a row. ``slope`` is ``q * d value / d q``: the gradient with respect to
    the logits, ``slope - q * sum(slope)``, follows from it.
    """

    value: Callable
    slope: Callable


def kl_value(x):
    return x.p * (x.log_p - x.log_q)


def kl_slope(x):
    return -x.p


def ce_value(x):
    return -x.hit * x.log_q


def ce_slope(x):
    return -x.hit


def tv_value(x):
    return torch.where(x.q < x.p, x.p - x.q, 0.0)


def tv_slope(x):
    return torch.where(x.q < x.p, -x.q, 0.0)


def lk_value(x):
    blend = torch.exp(-3.0 * x.alpha)
    return blend * kl_value(x) + (1 - blend) * tv_value(x)


def lk_slope(x):
    blend = torch.exp(-3.0 * x.alpha)
    return blend * kl_slope(x) + (1 - blend) * tv_slope(x)


LOSSES = {
    "kl": Loss(kl_value, kl_slope),
    "ce": Loss(ce_value, ce_slope),
    "tv": Loss(tv_value, tv_slope),
    "lk_hybrid": Loss(lk_value, lk_slope),
}
Terms = Sequence[tuple[Loss, float]]  # what is summed, each by its weight


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
class LogitsByPosition(Protocol):
    """The target's logits, looked up or computed when asked for."""

    def __getitem__(self, position: Int[Tensor, " P"]) -> Float[Tensor, "P W"]: ...


def head_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "W D"],
    target: LogitsByPosition,
    position: Int[Tensor, " N"],
    *,
    mix: Mapping[str, float],
    ops: Reference,
    weights: Float[Tensor, " N"] | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, " N"]]:
    """Summed loss of ``N`` rows and the drafter's first choice in each.

    Args:
        hidden: last hidden states of the rows, normed.
        weight: the draft head.
        target: its logits, once per position (again where two chunks meet), shared by the rows
            that guess it.
        position: which position each row guesses; rows in any order. Best on the CPU: chunks are
            planned from it, and a GPU would be waited for.
        mix: weights of the losses (see ``check_mix``).
        weights: of the rows; default 1.

    Rows are taken by position, a chunk at a time, so that rows which guess the same token share
    the target's distribution of it. Gradients are taken in the same pass: no logits outlive their
    chunk, and memory never holds [N, W]. Do not rescale the loss of a piece: the head's gradient
    is already accumulated.
    """
    dtype = compute_dtype(hidden)
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    terms = [(LOSSES[name], float(share)) for name, share in mix.items()]
    with without_autocast(hidden.device):  # it would round sums of float32, too
        return _HeadLoss.apply(hidden, weight, dtype, needed, target, position, terms, weights, ops)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, dtype, needed, target, position, terms, weights, ops):
        order = torch.argsort(position)
        position, order = position[order], order.to(hidden.device, non_blocking=True)
        states = ops.pad_rows(hidden[order].to(dtype))
        head = ops.main_grads.cast(weight, dtype)
        total = states.new_zeros((), dtype=at_least_float32(dtype))
        guess = torch.empty_like(order)
        main_grad = ops.main_grads.of(weight) if needed else None
        if needed:
            grad_hidden = torch.empty_like(hidden)
            grad_weight = torch.zeros_like(weight) if main_grad is None else main_grad
        at_positions, at_rows = ops.fused_loss(dtype) or (target_of, finish)
        for rows in slices(len(order), ops.head_chunk):
            # The last chunk takes the zeros behind it along: they add nothing.
            chunk = rows if rows.stop < len(order) else slice(rows.start, len(states))
            count = rows.stop - rows.start
            target_logits, shared = target_at(target, position[rows], states)
            known = at_positions(target_logits, ops)
            logits = ops.product(states[chunk], head)
            for some in slices(count, ops.loss_rows(logits)):
                lines = order[rows][some]
                share = None if weights is None else weights[lines].to(total.dtype)
                loss, guess[lines] = at_rows(
                    logits[some], known, shared[some], share, terms, needed, ops
                )
                total += loss
            if needed:
                grad_hidden[order[rows]] = ops.product(logits, head.T)[:count].to(hidden.dtype)
                ops.add_product(grad_weight, logits.T, states[chunk])
            del logits, target_logits, known  # so that the next are given the same memory
        ctx.mark_non_differentiable(guess)
        ctx.accumulated = main_grad is not None
        if needed:
            ctx.save_for_backward(grad_hidden, *([] if ctx.accumulated else [grad_weight]))
        return total, guess

    @staticmethod
    def backward(ctx, grad_total, _):
        """Raises ``RuntimeError`` where the accumulated gradient would have to be scaled; on CUDA
        the next call that waits for the GPU does."""
        if ctx.accumulated:
            torch._assert_async(
                grad_total == 1,
                "scale the sum of the pieces, not a piece: the head's gradient is accumulated",
            )
        # What is handed on is what was saved, so a second backward pass must raise, and does:
        # saved tensors have versions.
        for_hidden, *for_weight = (x.mul_(grad_total.to(x.dtype)) for x in ctx.saved_tensors)
        return for_hidden, *(for_weight or [None]), *[None] * 7


def slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def target_at(
    target: LogitsByPosition, position: Int[Tensor, " C"], like: Float[Tensor, "..."]
) -> tuple[Float[Tensor, "P W"], Int[Tensor, " C"]]:
    """The target's logits of each position once, and which of them every row guesses."""
    found = torch.unique_consecutive(position, return_inverse=True)
    distinct, shared = (x.to(like.device, non_blocking=True) for x in found)
    return target[distinct].to(at_least_float32(like.dtype)), shared


def target_of(logits: Float[Tensor, "P W"], ops: Reference) -> Target:
    p, label = torch.softmax(logits, -1), ops.first_choice(logits)
    lse = log_sum_exp(logits, p, label)
    return Target(p, logits, lse, torch.linalg.vecdot(p, logits) - lse, label)


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
    terms: Terms,
    with_grad: bool,
    ops: Reference,
) -> tuple[Float[Tensor, ""], Int[Tensor, " C"]]:
    """Summed loss of some rows and their first choices; the logits' gradient takes their place."""
    exact = logits.to(target.p.dtype)
    x = RowStats(target, shared, exact, ops.first_choice(exact))
    weights = torch.ones_like(x.lse) if weights is None else weights
    alone = len(terms) == 1 and terms[0][0] is LOSSES["kl"]
    if alone:
        # The default, in half the passes over [C, W]: with no logarithm, and no slope but q - p.
        value = x.target.neg_entropy[shared] - torch.linalg.vecdot(x.p, exact) + x.lse
        weights = weights * terms[0][1]
    else:
        value = sum(entry.value(x) * share for entry, share in terms).sum(-1)
    if with_grad:
        if alone:
            grad = x.q.sub_(x.p)
        else:
            slope = sum(entry.slope(x) * share for entry, share in terms)
            grad = slope.sub_(x.q * slope.sum(-1, keepdim=True))
        logits.copy_(grad.mul_(weights[:, None]))
    return (value * weights).sum(), x.first
