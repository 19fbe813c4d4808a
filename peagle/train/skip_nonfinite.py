"""Steps that must not be taken: those with a loss or gradients that are not finite."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils import get_total_norm


def nan_unless_finite(loss: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """The same loss; when it is not finite, neither are its gradients.

    Data-parallel training sums gradients over ranks, so a bad loss on one rank shows in the
    gradients of all, and all come to the same decision without asking each other.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


class SkipNonfinite:
    """Skips optimizer steps whose gradients are not finite, and counts them.

    Args:
        patience: skipped steps in a row after which the run is to stop.
    """

    def __init__(self, patience: int = 3):
        self.patience, self.skipped, self.in_a_row = patience, 0, 0

    @torch.no_grad()
    def norm(self, parameters: list[Tensor]) -> Float[Tensor, ""]:
        """Norm of all gradients. If it is not finite, the gradients are dropped.

        An optimizer passes over a parameter without a gradient: the weight, its moments, its step
        count and its decay all stay as they are, to the bit.
        """
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if norm.isfinite():
            self.in_a_row = 0
            return norm
        self.skipped += 1
        self.in_a_row += 1
        for parameter in parameters:
            parameter.grad = None
        return norm

    def stop_if_hopeless(self) -> None:
        """Raise ``ValueError`` after ``patience`` skipped steps in a row."""
        if self.in_a_row >= self.patience:
            raise ValueError(
                f"loss or gradients were not finite in {self.in_a_row} steps in a row "
                f"({self.skipped} in all): the checkpoint holds the last good weights; lower the "
                "learning rate or look at the data"
            )
