"""Where a drafter's weights start: embedding, norm and head are the target's own."""

import torch
from jaxtyping import Int
from torch import Tensor

from peagle.model.drafter import PEagleDrafter
from peagle.model.target_head import TargetHead


@torch.no_grad()
def initialise(drafter: PEagleDrafter, target: TargetHead, kept: Int[Tensor, " W"]) -> None:
    """Copy what the target has; ``kept`` are the target ids of the draft vocabulary.

    ``fc`` starts by passing on the deepest captured layer, so that the untrained drafter reads
    the target's last known state through the target's own head. A drafter of another width
    starts from random weights, as there is nothing to copy.
    """
    config = drafter.config
    drafter.mask_hidden.normal_(std=config.initializer_range)
    if config.hidden_size != config.target_hidden_size:
        return
    drafter.embed_tokens.weight.copy_(target.embedding)
    drafter.lm_head.weight.copy_(target.head[kept])
    drafter.norm.weight.copy_(target.norm)
    drafter.fc.weight[:, -config.hidden_size :] += torch.eye(config.hidden_size)
