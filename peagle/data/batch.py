"""What the loader hands to the module: one packed sequence of slots, and how to segment it."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peagle.cod.segments import Segment
from peagle.data.store import Manifest, Sample


class Batch(NamedTuple):
    """Slots of one or several documents, in vLLM's layout: everything is aligned to the slot.

    Slot ``p`` of a document reads token ``x[p+1]`` and hidden states ``h[p]`` and guesses
    ``x[p+2]``; the target's own distribution of ``x[p+2]`` comes from its last layer at ``p+1``.
    A row (anchor, depth) stands in for slot ``anchor + depth`` and shares its label.
    """

    tokens: Int[Tensor, " S"]  # x[p+1]
    labels: Int[Tensor, " S"]  # x[p+2]
    aux: Float[Tensor, "S AD"]  # h[p], the captured layers side by side
    final: Float[Tensor, "S T"]  # the target's last layer at p+1, before its norm
    position: Int[Tensor, " S"]  # p, from 0 in every document
    # The next two stay on the CPU: the draw is made there, the same on every device.
    document: Int[Tensor, " S"]  # 0, 0, ..., 1, 1, ...
    supervised: Bool[Tensor, " S"]
    segments: tuple[Segment, ...]
    seed: int  # of the COD draw
    bad: tuple[str, ...] = ()  # what was wrong with samples that should have been here


def slots_of(sample: Sample) -> dict[str, Tensor]:
    """One document as slots; a sample of ``n`` tokens has ``n - 2`` of them.

    The loss mask follows the token that a slot reads: a drafter is only ever asked to guess after
    a token of the assistant. The guessed token must be the assistant's too.
    """
    mask = sample.loss_mask
    return {
        "tokens": sample.input_ids[1:-1],
        "labels": sample.input_ids[2:],
        "aux": sample.aux[:-2],
        "final": sample.final[1:-1],
        "position": torch.arange(len(mask) - 2),
        "supervised": mask[1:-1] & mask[2:],
    }


def pack(samples: list[Sample]) -> dict[str, Tensor]:
    """Several documents one after the other, numbered in ``document``."""
    parts = [slots_of(sample) for sample in samples]
    packed = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    lengths = torch.tensor([len(part["tokens"]) for part in parts])
    packed["document"] = torch.repeat_interleave(lengths)
    return packed


def unsupervised(manifest: Manifest) -> Sample:
    """A document without anything to learn: what a sequence holds when all its samples are bad.

    A step must still happen, or the ranks would part.
    """
    width = manifest.hidden_size
    return Sample(
        input_ids=torch.zeros(3, dtype=torch.long),
        loss_mask=torch.zeros(3, dtype=torch.bool),
        aux=torch.zeros(3, width * len(manifest.layer_ids), dtype=torch.bfloat16),
        final=torch.zeros(3, width, dtype=torch.bfloat16),
    )
