"""Divergence between target and drafter, fused with the draft head.

``p`` is the target's distribution and ``q`` the drafter's, both over the draft vocabulary, and
``alpha = sum(min(p, q))`` the chance that rejection sampling accepts the guess.

    kl         sum(p * log(p / q))                            the default
    ce         -log(q[argmax p])                              hard labels
    tv         1 - alpha                                      total variation distance
    lk_hybrid  lambda * kl + (1 - lambda) * tv,               arXiv 2602.23881;
               lambda = exp(-3 * alpha), held constant        kl early, acceptance late
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

LOSSES = ("kl", "ce", "tv", "lk_hybrid")
LK_DECAY = 3.0
CHUNK_ROWS = 1024  # logits exist for this many rows at a time


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


def head_loss(
    hidden: Float[Tensor, "N D"],
    weight: Float[Tensor, "W D"],
    teacher: Float[Tensor, "P W"],
    position: Int[Tensor, " N"],
    *,
    mix: Mapping[str, float],
) -> tuple[Float[Tensor, ""], Int[Tensor, " N"]]:
    """Summed loss of ``N`` rows and the drafter's first choice in each.

    Args:
        hidden: last hidden states of the rows, normed.
        weight: the draft head.
        teacher: the target's logits, once per position, shared by the rows that guess it.
        position: which line of ``teacher`` each row guesses.
        mix: weights of the losses (see ``check_mix``).

    Gradients are taken chunk by chunk in the forward pass, so memory does not hold [N, W].
    """
    return _HeadLoss.apply(hidden, weight, teacher, position, dict(mix))


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, teacher, position, mix):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        if not torch.is_autocast_enabled(hidden.device.type):
            dtype = hidden.dtype
        needed = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        head, states = weight.to(dtype), hidden.to(dtype)
        teacher_log = torch.log_softmax(teacher.to(at_least_float(teacher.dtype)), -1)
        total = teacher_log.new_zeros(())
        guess = torch.empty_like(position)
        grad_hidden = torch.empty_like(states) if needed else None
        grad_weight = torch.zeros_like(weight) if needed else None
        for start in range(0, len(states), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            logits = F.linear(states[rows], head).to(teacher_log.dtype)
            guess[rows] = logits.argmax(-1)
            loss, grad = divergence(teacher_log[position[rows]], logits, mix)
            total += loss
            if needed:
                grad = grad.to(dtype)
                torch.mm(grad, head, out=grad_hidden[rows])
                grad_weight += grad.T @ states[rows]
        ctx.mark_non_differentiable(guess)
        if needed:
            ctx.save_for_backward(grad_hidden.to(hidden.dtype), grad_weight)
        return total, guess

    @staticmethod
    def backward(ctx, grad_total, _):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = grad_total.to(grad_hidden.dtype)
        return grad_hidden * scale, grad_weight * grad_total, None, None, None


def at_least_float(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def divergence(
    teacher_log: Float[Tensor, "C W"], logits: Float[Tensor, "C W"], mix: Mapping[str, float]
) -> tuple[Float[Tensor, ""], Float[Tensor, "C W"]]:
    """Summed loss of a chunk and its gradient with respect to the logits.

    For a loss ``f(q)`` the gradient is ``q * (f'(q) - sum(q * f'(q)))``; that of ``kl`` is
    ``q - p`` and that of ``tv``, where ``f'(q) = -[q < p]``, is ``q * (sum(q[q < p]) - [q < p])``.
    """
    draft_log = torch.log_softmax(logits, -1)
    p, q = teacher_log.exp(), draft_log.exp()
    kl_share = torch.full_like(p[:, :1], mix.get("kl", 0.0))
    tv_share = torch.full_like(kl_share, mix.get("tv", 0.0))
    if "lk_hybrid" in mix:
        blend = torch.exp(-LK_DECAY * torch.minimum(p, q).sum(-1, keepdim=True))
        kl_share = kl_share + mix["lk_hybrid"] * blend
        tv_share = tv_share + mix["lk_hybrid"] * (1 - blend)

    total, grad = logits.new_zeros(()), torch.zeros_like(logits)
    if "kl" in mix or "lk_hybrid" in mix:
        each = (p * (teacher_log - draft_log)).sum(-1, keepdim=True)
        total = total + (kl_share * each).sum()
        grad += kl_share * (q - p)
    if "tv" in mix or "lk_hybrid" in mix:
        below = (q < p).to(q.dtype)
        each = ((p - q) * below).sum(-1, keepdim=True)  # = 1 - sum(min(p, q))
        total = total + (tv_share * each).sum()
        grad += tv_share * q * ((q * below).sum(-1, keepdim=True) - below)
    if "ce" in mix:
        label = teacher_log.argmax(-1, keepdim=True)
        total = total - mix["ce"] * draft_log.gather(-1, label).sum()
        grad += mix["ce"] * q
        grad.scatter_add_(-1, label, torch.full_like(kl_share, -mix["ce"]))
    return total, grad


def global_mean(total: Float[Tensor, ""], count: int) -> Float[Tensor, ""]:
    """``total`` over the number of rows of all ranks, so that every row weighs the same.

    Data-parallel training averages gradients over ranks; the factor of the world size undoes it.
    """
    everywhere = torch.tensor(float(max(count, 1)), device=total.device)
    world = 1
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(everywhere)
        world = dist.get_world_size()
    return total * (world / everywhere)
