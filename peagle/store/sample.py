"""One conversation as captured: its tokens and the target's hidden states."""

from typing import NamedTuple

import torch
import xxhash
from jaxtyping import Bool, Float, Int
from torch import Tensor

TENSORS = ("input_ids", "loss_mask", "aux", "final")


class Sample(NamedTuple):
    """One document as captured; all of the same length ``n``."""

    input_ids: Int[Tensor, " n"]
    loss_mask: Bool[Tensor, " n"]  # tokens of the assistant
    aux: Float[Tensor, "n AD"]  # captured layers side by side, ascending
    final: Float[Tensor, "n T"]  # output of the last layer, before the final norm


def digest(tensor: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.view(torch.uint8).numpy())
