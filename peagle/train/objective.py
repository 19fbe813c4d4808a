"""The training objective of one packed sequence, piece by piece.

The paper's Algorithm 1 bounds memory by reading the depth-0 prefix again in every segment. Here
depth 0 runs once; each piece then runs forward *and* backward against its keys and values, and
only their gradients are kept. The caller gets one scalar, so Lightning's automatic optimisation,
clipping, accumulation, mixed precision and DDP work unchanged.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peagle.cod.sampling import Rows
from peagle.cod.segments import Piece, pieces
from peagle.kernels.cpu.packed_weight import Weight
from peagle.kernels.grad_accumulation import held_sum
from peagle.model.drafter import Drafter, Stream
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
    """The target's logits at the positions that are asked for; its head is laid out for all."""

    head: TargetHead
    final: Float[Tensor, "S T"]

    def __getitem__(self, position: Int[Tensor, " P"]) -> Float[Tensor, "P W"]:
        return self.head(self.final[position], self.weight)

    @cached_property
    def weight(self) -> Weight:
        return self.head.factor(lasting=True)


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
    """Loss of all ``rows``, with gradients held per piece when gradients are enabled.

    A row of depth ``d`` weighs ``depth_decay ** d``. ``recompute`` runs depth 0 again in the
    backward pass instead of keeping its activations.
    """
    stream = drafter.depth_zero(
        batch.tokens,
        batch.aux,
        batch.position,
        document_lengths=torch.bincount(batch.document).tolist(),
        recompute=recompute and torch.is_grad_enabled(),
    )
    teacher = TargetLogits(target_head, batch.final)
    correct: list[Tensor] = []

    def part(piece: Piece) -> Callable[[Stream], Tensor]:
        def run(local: Stream) -> Tensor:
            loss, hits = piece_loss(
                drafter, teacher, batch, piece, local, mix=mix, depth_decay=depth_decay
            )
            correct.append(hits)
            return loss

        return run

    parts = [part(piece) for piece in pieces(rows, batch.segments) if len(piece.rows.anchor)]
    if torch.is_grad_enabled():
        loss = held_sum(parts, stream, drafter.shared_parameters())
    else:
        loss = sum((run(stream) for run in parts), stream.hidden.new_zeros((), dtype=torch.float32))
    none = torch.zeros(0, dtype=torch.bool, device=stream.hidden.device)
    hits = torch.cat([none, *correct])
    weight = float((depth_decay ** rows.depth.double()).sum())
    return Outcome(loss, weight, rows, hits)


def piece_loss(
    drafter: Drafter,
    teacher: TargetLogits,
    batch: Batch,
    piece: Piece,
    stream: Stream,
    *,
    mix: Mapping[str, float],
    depth_decay: float,
) -> tuple[Float[Tensor, ""], Bool[Tensor, " N"]]:
    """Summed loss of the rows of one piece, all depths, and whether each guess is right."""

    def moved(x: Tensor) -> Tensor:
        return x.to(stream.hidden.device, non_blocking=True)

    rows = piece.rows
    deep = rows.depth > 0
    known, guessed = torch.nonzero(~deep).flatten(), torch.nonzero(deep).flatten()
    hidden = stream.hidden.index_select(0, moved(rows.anchor[known]))
    if len(guessed):
        deeper = drafter.rollouts(piece.deeper, stream, batch.position, batch.document)
        hidden = torch.cat([hidden, deeper[: len(guessed)].to(hidden.dtype)])
    order = torch.cat([known, guessed])
    position = rows.position[order]
    weights = None
    if depth_decay != 1:
        weights = moved((depth_decay ** rows.depth[order]).float())
    loss, guess = head_loss(
        drafter.norm(hidden),
        drafter.lm_head.weight,
        teacher,
        position,
        mix=mix,
        weights=weights,
    )
    right = drafter.target_ids(guess) == batch.labels[moved(position)]
    return loss, torch.empty_like(right).index_copy_(0, moved(order), right)
