"""The training objective of one packed sequence: NTP once, then MTP rows piece by piece.

The paper's Algorithm 1 bounds memory by reading the NTP prefix again in every segment. Here NTP
runs once. Each piece then runs forward *and* backward against its keys and values, and only their
gradients are kept. The caller gets one scalar, so Lightning's automatic optimisation, clipping,
accumulation, mixed precision and DDP work unchanged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peagle.cod.sampling import Rows
from peagle.cod.segments import Piece, pieces
from peagle.kernels.grad_accumulation import MainGrads, accumulate
from peagle.kernels.reference import Reference
from peagle.model.drafter import Drafter, NTPStates
from peagle.target.head import TargetHead
from peagle.train.loss import head_loss
from peagle.train.packing import Batch


class Outcome(NamedTuple):
    """Summed loss over ``rows``, what they weigh together, and which the drafter guessed right."""

    loss: Float[Tensor, ""]
    weight: float
    rows: Rows
    correct: Bool[Tensor, " N"]


@dataclass(frozen=True)
class TargetLogits:
    """The target's logits at the positions that are asked for."""

    head: TargetHead
    final: Float[Tensor, "S T"]
    ops: Reference

    def __getitem__(self, position: Int[Tensor, " P"]) -> Float[Tensor, "P W"]:
        return self.head(self.final[position], self.ops)


def objective(
    drafter: Drafter,
    target_head: TargetHead,
    batch: Batch,
    rows: Rows,
    *,
    mix: Mapping[str, float],
    depth_decay: float = 1.0,
    recompute: bool = False,
) -> Outcome:
    """Loss of all ``rows``; gradients are accumulated per piece when gradients are enabled.

    A row of depth ``d`` weighs ``depth_decay ** d``. ``recompute`` runs NTP again in the backward
    pass instead of keeping its activations.
    """
    ops = drafter.ops
    ntp = drafter.ntp_forward(
        batch.tokens,
        batch.aux,
        batch.position,
        document_lengths=torch.bincount(batch.document).tolist(),
        recompute=recompute and torch.is_grad_enabled(),
    )
    target = TargetLogits(target_head, batch.final, ops)
    correct: list[Tensor] = []

    def loss_of(piece: Piece, ntp: NTPStates, main_grads: MainGrads | None) -> Tensor:
        piece_ops = ops if main_grads is None else ops.accumulating(main_grads)
        weights = None if depth_decay == 1 else (depth_decay**piece.rows.depth).float()
        loss, right = piece_loss(drafter, target, batch, piece, ntp, piece_ops, mix, weights)
        correct.append(right)
        return loss

    cut = pieces(rows, batch.segments, unit=ops.row_unit)
    losses: list[Callable] = [partial(loss_of, piece) for piece in cut if len(piece.rows.anchor)]
    if torch.is_grad_enabled():
        loss = accumulate(losses, ntp, drafter.shared_parameters())
    else:
        zero = ntp.hidden.new_zeros((), dtype=torch.float32)
        loss = sum((of_piece(ntp, None) for of_piece in losses), zero)
    none = torch.zeros(0, dtype=torch.bool, device=ntp.hidden.device)
    weight = float((depth_decay ** rows.depth.double()).sum())
    return Outcome(loss, weight, rows, torch.cat([none, *correct]))


def piece_loss(
    drafter: Drafter,
    target: TargetLogits,
    batch: Batch,
    piece: Piece,
    ntp: NTPStates,
    ops: Reference,
    mix: Mapping[str, float],
    weights: Float[Tensor, " N"] | None,
) -> tuple[Float[Tensor, ""], Bool[Tensor, " N"]]:
    """Summed loss of the rows of one piece, all depths, and whether each guess is right."""

    def moved(x: Tensor) -> Tensor:
        return x.to(ntp.hidden.device, non_blocking=True)

    rows = piece.rows
    of_ntp, of_mtp = (torch.nonzero(x).flatten() for x in (rows.depth == 0, rows.depth > 0))
    hidden = ntp.hidden.index_select(0, moved(rows.anchor[of_ntp]))
    if len(of_mtp):
        states = drafter.mtp_forward(piece.mtp, ntp, batch.position, batch.document, ops)
        hidden = torch.cat([hidden, states[: len(of_mtp)].to(hidden.dtype)])
    order = torch.cat([of_ntp, of_mtp])
    position = rows.position[order]
    loss, guess = head_loss(
        drafter.norm(hidden, ops),
        drafter.lm_head.weight,
        target,
        position,
        mix=mix,
        weights=None if weights is None else moved(weights[order]),
        ops=ops,
    )
    right = drafter.target_ids(guess) == batch.labels[moved(position)]
    return loss, torch.empty_like(right).index_copy_(0, moved(order), right)
