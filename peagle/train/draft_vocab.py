"""The draft vocabulary: the target's tokens that the assistant uses most."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from peagle.store.sample import Sample


class DraftVocabulary(NamedTuple):
    """Draft ids are the kept target ids in ascending order."""

    token_ids: Int[Tensor, " W"]
    coverage: float  # share of the counted tokens that are kept

    def offsets(self) -> Int[Tensor, " W"]:
        """``d2t``: what to add to a draft id for its target id (zeros for a full vocabulary)."""
        return self.token_ids - torch.arange(len(self.token_ids))

    def membership(self, vocab_size: int) -> Bool[Tensor, " V"]:
        """``t2d``: whether a target token is in the draft vocabulary."""
        member = torch.zeros(vocab_size, dtype=torch.bool)
        member[self.token_ids] = True
        return member


def choose_vocabulary(counts: Int[Tensor, " V"], size: int | None) -> DraftVocabulary:
    """Keep the ``size`` most frequent tokens, lower ids first among equals; ``None`` keeps all.

    Raises:
        ValueError: if ``size`` is not between 1 and the target's vocabulary.
    """
    vocab_size = len(counts)
    size = vocab_size if size is None else size
    if not 1 <= size <= vocab_size:
        raise ValueError(f"draft_vocab_size must lie in 1..{vocab_size}, got {size}")
    order = torch.argsort(counts, descending=True, stable=True)
    kept = order[:size].sort().values
    return DraftVocabulary(kept, float(counts[kept].sum() / counts.sum().clamp(min=1)))


def token_counts(samples: Iterable[Sample], vocab_size: int) -> Int[Tensor, " V"]:
    """How often each token is the assistant's; decides which tokens a draft vocabulary keeps."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for sample in samples:
        counts += torch.bincount(sample.input_ids[sample.loss_mask], minlength=vocab_size)
    return counts
