"""The mean over all rows of an optimizer step: those of all its batches, on all ranks."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor

from peagle.train.objective import Outcome


class StepFigures(NamedTuple):
    """Means over all rows of a step; ``factor`` makes its gradients those of ``loss``."""

    loss: Float[Tensor, ""]
    accuracy: Float[Tensor, ""]
    factor: Float[Tensor, ""]


class StepMean:
    """Divides the loss of a step by its rows once, so that a row counts the same wherever it lies.

    The rows of a step are only known when its last batch is drawn, but every batch is
    back-propagated before that. So each batch is divided by the rows of the first, and the
    gradients are corrected by one factor at the end. A step of one batch needs no correction.
    """

    def __init__(self) -> None:
        self.first: Float[Tensor, 4] | None = None  # loss, weight, right guesses, rows; all ranks
        self.others: Float[Tensor, 4] | None = None  # of the batches after it, on this rank

    def add(self, outcome: Outcome) -> Float[Tensor, ""]:
        """The loss of one more batch of the step, to be back-propagated.

        Data-parallel training averages gradients over ranks; the factor of the world size undoes
        it.
        """
        total = outcome.loss.detach()
        weight, rows = (total.new_full((), x) for x in (outcome.weight, len(outcome.rows.anchor)))
        sums = torch.stack([total, weight, outcome.correct.sum().to(total), rows])
        if self.first is None:
            self.first = over_ranks(sums)
        else:
            self.others = sums if self.others is None else self.others + sums
        return outcome.loss * (world_size() / self.first[1].clamp(min=1))

    def finish(self) -> StepFigures:
        """The figures of the step; the next batch begins another one."""
        assert self.first is not None, "a step has a batch"
        sums = self.first if self.others is None else self.first + over_ranks(self.others)
        divisor, weight, rows = (x.clamp(min=1) for x in (self.first[1], sums[1], sums[3]))
        self.first = self.others = None
        return StepFigures(sums[0] * (1 / weight), sums[2] / rows, divisor / weight)


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def over_ranks(sums: Float[Tensor, "4"]) -> Float[Tensor, "4"]:
    if world_size() > 1:
        dist.all_reduce(sums)
    return sums


def rescale(parameters: Iterable[Tensor], factor: Float[Tensor, ""]) -> None:
    """Multiply the gradients of the parameters that have one."""
    for parameter in parameters:
        if parameter.grad is not None:
            parameter.grad.mul_(factor)
