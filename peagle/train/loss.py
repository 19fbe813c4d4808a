"""Divergence between target and drafter, fused with the draft head.

``p`` is the target's distribution and ``q`` the drafter's, both over the draft vocabulary, and
``alpha = sum(min(p, q))`` the chance that rejection sampling accepts the guess.

    kl         sum(p * log(p / q))                            the default
    ce         -log(q[argmax p])                              hard labels
    tv         1 - alpha                                      total variation distance
    lk_hybrid  lambda * kl + (1 - lambda) * tv,               arXiv 2602.23881;
               lambda = exp(-3 * alpha), held constant        kl early, acceptance late

To add a loss, write its value and its slope and add one line to ``LOSSES``. On CUDA the losses that
``kernels/cuda/loss.py`` names run as Triton kernels; any other runs as it stands here.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peagle.kernels.device import without_autocast
from peagle.kernels.precision import at_least_float32, compute_dtype
from peagle.kernels.reference import Reference

LK_DECAY = 3.0


class Target(NamedTuple):
    """The target's distribution at some positions."""

    p: Float[Tensor, "P W"]
    neg_entropy: Float[Tensor, " P"]  # sum(p * log(p))
    label: Int[Tensor, " P"]  # argmax p

    def of(self, which: Int[Tensor, " C"]) -> "Target":
        """One entry for each row that guesses one of the positions."""
        return Target(*(x.index_select(0, which) for x in self))


@dataclass
class RowStats:
    """What losses are made of: both distributions in every row of a chunk, [C, W]."""

    target: Target
    logits: Float[Tensor, "C W"]
    first: Int[Tensor, " C"]  # argmax of the logits

    @cached_property
    def q(self) -> Float[Tensor, "C W"]:
        return torch.softmax(self.logits, -1)

    @cached_property
    def lse(self) -> Float[Tensor, " C"]:
        """log(sum(exp(logits)))"""
        return log_sum_exp(self.logits, self.q, self.first)

    @cached_property
    def below(self) -> Bool[Tensor, "C W"]:
        """Where the drafter gives less than the target."""
        return self.q < self.target.p

    @cached_property
    def alpha(self) -> Float[Tensor, " C"]:
        """Chance that rejection sampling accepts the guess."""
        return torch.minimum(self.target.p, self.q).sum(-1)

    @cached_property
    def blend(self) -> Float[Tensor, " C"]:
        return torch.exp(-LK_DECAY * self.alpha)

    @property
    def labels(self) -> tuple[Tensor, Tensor]:
        """Where the target's first choices stand."""
        return torch.arange(len(self.first), device=self.first.device), self.target.label


class Loss(NamedTuple):
    """One divergence between ``p`` and ``q``, per row.

    ``slope`` is ``q * d value / d q``. The gradient with respect to the logits follows from it:
    ``slope - q * sum(slope)``.
    """

    value: Callable[[RowStats], Float[Tensor, " C"]]
    slope: Callable[[RowStats], Float[Tensor, "C W"]]


def kl_value(row: RowStats) -> Float[Tensor, " C"]:
    """Without a logarithm of [C, W]: ``sum(p log p) - sum(p * logits) + lse``."""
    cross = torch.linalg.vecdot(row.target.p, row.logits)
    return row.target.neg_entropy - cross + row.lse


def kl_slope(row: RowStats) -> Float[Tensor, "C W"]:
    return -row.target.p


def ce_value(row: RowStats) -> Float[Tensor, " C"]:
    return row.lse - row.logits[row.labels]


def ce_slope(row: RowStats) -> Float[Tensor, "C W"]:
    slope = torch.zeros_like(row.q)
    slope[row.labels] = -1.0
    return slope


def tv_value(row: RowStats) -> Float[Tensor, " C"]:
    return 1 - row.alpha


def tv_slope(row: RowStats) -> Float[Tensor, "C W"]:
    return -(row.q * row.below)


def lk_value(row: RowStats) -> Float[Tensor, " C"]:
    return row.blend * kl_value(row) + (1 - row.blend) * tv_value(row)


def lk_slope(row: RowStats) -> Float[Tensor, "C W"]:
    blend = row.blend[:, None]
    return blend * kl_slope(row) + (1 - blend) * tv_slope(row)


LOSSES = {
    "kl": Loss(kl_value, kl_slope),
    "ce": Loss(ce_value, ce_slope),
    "tv": Loss(tv_value, tv_slope),
    "lk_hybrid": Loss(lk_value, lk_slope),
}


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
    with without_autocast(hidden.device):  # it would round sums of float32, too
        return _HeadLoss.apply(
            hidden, weight, dtype, needed, target, position, dict(mix), weights, ops
        )


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, dtype, needed, target, position, mix, weights, ops):
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
        at_positions, at_rows = ops.fused_loss(mix, dtype) or (target_of, finish)
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
                    logits[some], known, shared[some], share, mix, needed, ops
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
    neg_entropy = torch.linalg.vecdot(p, logits) - log_sum_exp(logits, p, label)
    return Target(p, neg_entropy, label)


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
    ops: Reference,
) -> tuple[Float[Tensor, ""], Int[Tensor, " C"]]:
    """Summed loss of some rows and their first choices; the logits' gradient takes their place."""
    exact = logits.to(target.p.dtype)
    row = RowStats(target.of(shared), exact, ops.first_choice(exact))
    loss, grad = divergence(row, mix=mix, weights=weights, with_grad=with_grad)
    if grad is not None:
        logits.copy_(grad)
    return loss, row.first


def divergence(
    row: RowStats,
    *,
    mix: Mapping[str, float],
    weights: Float[Tensor, " C"] | None,
    with_grad: bool,
) -> tuple[Float[Tensor, ""], Float[Tensor, "C W"] | None]:
    """Summed loss of a chunk, each row by its weight, and its gradient with respect to the logits.

    The gradient takes the place of ``q``. That of ``kl`` alone is ``q - p``.
    """
    every = torch.ones_like(row.lse) if weights is None else weights
    total = sum((share * every * LOSSES[name].value(row)).sum() for name, share in mix.items())
    if not with_grad:
        return total, None
    if set(mix) == {"kl"}:
        grad = row.q.sub_(row.target.p)
        return total, grad if weights is None and mix["kl"] == 1 else grad.mul_(
            (mix["kl"] * every)[:, None]
        )
    slope = sum(LOSSES[name].slope(row) * share for name, share in mix.items())
    slope *= every[:, None]
    return total, slope.sub_(row.q.mul_(slope.sum(-1, keepdim=True)))
