"""What the loader hands to the module: one packed sequence of slots, and how to segment it."""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peagle.cod.segments import Segment
from peagle.store.manifest import Manifest
from peagle.store.reader import Store
from peagle.store.sample import Sample
from peagle.train.buffers import Buffers


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
    packed = {name: joined([part[name] for part in parts]) for name in parts[0]}
    numbers = [torch.full_like(part["tokens"], number) for number, part in enumerate(parts)]
    packed["document"] = torch.cat(numbers)
    return packed


def joined(parts: list[Tensor]) -> Tensor:
    """``torch.cat`` that copies nothing where the parts lie one behind the other already."""
    first, storages = parts[0], {part.untyped_storage().data_ptr() for part in parts}
    behind = all(a.data_ptr() + a.nbytes == b.data_ptr() for a, b in pairwise(parts))
    if len(storages) == 1 and behind and all(part.is_contiguous() for part in parts):
        return first.as_strided((sum(map(len, parts)), *first.shape[1:]), first.stride())
    return torch.cat(parts)


class StatesInPlace:
    """The hidden states of one packed sequence: samples are read right to where their slots are.

    A sample of ``n`` tokens fills ``n - 2`` slots, but all its states are read, to be verified.
    Those of ``aux`` that no slot needs come last, and the next sample is read over them. ``final``
    begins with one, which falls on the last slot of the sample before; that one is put back.
    """

    def __init__(self, slots: int, manifest: Manifest, buffers: Buffers):
        rows, layers = slots + 2, len(manifest.layer_ids)
        memory = buffers.take(2 * rows * (layers + 1) * manifest.hidden_size)
        states = memory.view(torch.bfloat16).view(layers + 1, rows, manifest.hidden_size)
        self.aux, self.final = states[:-1].view(rows, -1), states[-1]
        self.filled = 0

    def read(self, store: Store, index: int) -> Sample:
        """The next sample. A bad one leaves its place to the one after it."""
        rows = slice(self.filled, self.filled + store.entries[index].tokens)
        before = self.final[self.filled].clone()
        try:
            sample = store.read(index, (self.aux[rows], self.final[rows]))
        finally:
            self.final[self.filled] = before
        self.filled = rows.stop - 2
        return sample


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
