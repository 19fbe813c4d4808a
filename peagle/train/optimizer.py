"""Muon for the layers' matrices and AdamW for everything else, as one optimizer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer

from peagle.kernels.device import without_slow_bf16

MATRICES = "matrices"  # key of a parameter group that holds hidden matrices


class MuonAdamW(Optimizer):
    """Muon orthogonalises the updates of hidden matrices, which learns in fewer steps.

    Embedding, head, norms and vectors are no linear maps between hidden states; they get AdamW.
    Both use the same learning rate: Muon's updates are scaled to the size of AdamW's.

    Args:
        groups: parameter groups; those with ``matrices=True`` go to Muon.
        lr: peak learning rate.
        weight_decay: of the matrices.
        betas: of AdamW.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.95),
    ):
        groups = [dict(group) for group in groups]
        super().__init__(groups, {"lr": lr})
        matrices = [p for g in groups if g.get(MATRICES) for p in g["params"]]
        rest = [p for g in groups if not g.get(MATRICES) for p in g["params"]]
        self.muon = Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = AdamW(rest, lr=lr, betas=betas, weight_decay=0.0)
        self.param_groups = [*self.muon.param_groups, *self.adamw.param_groups]
        self.share()

    def share(self) -> None:
        """Let both optimizers work on this one's groups and state."""
        self.muon.param_groups = self.param_groups[:1]
        self.adamw.param_groups = self.param_groups[1:]
        self.muon.state = self.adamw.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.share()

    def step(self, closure: Callable[[], Tensor] | None = None) -> Tensor | None:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        matrix = self.muon.param_groups[0]["params"][0]
        with without_slow_bf16(matrix.device):
            self.muon.step()
        self.adamw.step()
        return loss


def parameter_groups(drafter: nn.Module) -> list[dict[str, Any]]:
    """Hidden matrices apart from the rest, for optimizers that tell them apart."""
    trained = [(name, p) for name, p in drafter.named_parameters() if p.requires_grad]
    places = ("layers.", "fc.", "row_states.project.")
    matrices = [p for name, p in trained if p.ndim == 2 and name.startswith(places)]
    inside = {id(p) for p in matrices}
    rest = [p for _, p in trained if id(p) not in inside]
    return [{"params": matrices, MATRICES: True}, {"params": rest, MATRICES: False}]
