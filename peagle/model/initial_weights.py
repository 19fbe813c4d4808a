"""Where a drafter's weights start: from what the target already knows.

Embedding, norm and head are the target's. Layer 0 is an entrance: its attention is turned onto
the slot itself and passes the token's *embedding* into the residual stream, so that the layers
above, copies of target layers, read what they were made to read. (The residual stream of EAGLE-3
carries the hidden state of the token before, which holds what that slot already knows.) Measured
in docs/log.md: after equally many steps far ahead of random layers.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Int
from torch import Tensor

from peagle.model.drafter import Drafter
from peagle.model.layers import DrafterLayer
from peagle.model.p_eagle import PEagleDrafter
from peagle.target.head import TargetHead
from peagle.target.layers import TargetLayers

SHARPNESS = 1.5  # of the entrance's attention: a slot sees itself, other slots hardly
QUIET = 0.002  # standard deviation of what starts out of the way but must learn


@torch.no_grad()
def initialise(
    drafter: Drafter, target: TargetHead, kept: Int[Tensor, " W"], layers: TargetLayers
) -> list[int]:
    """Copy what fits; ``kept`` are the target ids of the draft vocabulary.

    A drafter of another width starts from random weights. Layers are copied where keys and values
    are as wide as the hidden state (set ``num_key_value_heads``), since a narrower entrance
    cannot carry the embedding, and without ``norm_before_residual``.

    Returns:
        The target layers that the drafter's layers 1, 2, ... start from.
    """
    config = drafter.config
    if isinstance(drafter, PEagleDrafter):
        drafter.mask_hidden.normal_(std=config.initializer_range)
    if config.hidden_size != config.target_hidden_size:
        return []
    drafter.embed_tokens.weight.copy_(target.embedding)
    drafter.lm_head.weight.copy_(target.head[kept])
    drafter.norm.weight.copy_(target.norm)
    chosen = layers.choose(config.num_hidden_layers - 1)
    if not carries_embedding(drafter) or not fits(drafter, layers):
        drafter.fc.weight[:, -config.hidden_size :] += torch.eye(config.hidden_size)
        return []
    drafter.fc.weight.normal_(std=QUIET)
    open_entrance(drafter.layers[0], scale=target.embedding.float().pow(2).mean().sqrt())
    for layer, index in zip(drafter.layers[1:], chosen, strict=False):
        copy_layer(layer, layers.layers[index])
    return chosen


def carries_embedding(drafter: Drafter) -> bool:
    """Whether layer 0 can be an entrance: wide enough, and its residual starts near zero.

    ``norm_before_residual`` scales even a small residual up, and the embedding would drown in it.
    """
    config = drafter.config
    wide = config.num_key_value_heads * config.head_dim == config.hidden_size
    return wide and not config.norm_before_residual


def fits(drafter: Drafter, layers: TargetLayers) -> bool:
    """Whether the target's layers have the shapes of the drafter's, but for shared keys."""
    if len(drafter.layers) < 2 or not layers.layers:
        return False
    ours = drafter.layers[1].state_dict()
    return all(
        name.endswith(("k_proj.weight", "v_proj.weight")) or tensor.shape == ours[name].shape
        for layer in layers.layers.values()
        for name, tensor in layer.items()
    )


def open_entrance(layer: DrafterLayer, *, scale: Tensor) -> None:
    """Attention onto the slot itself, whose value is the embedding; a silent feed-forward."""
    attention = layer.self_attn
    width = attention.o_proj.out_features
    identity = torch.eye(width)
    heads = identity.unflatten(0, (-1, attention.head_dim))  # [G, E, D]
    groups = attention.q_proj.out_features // width
    wide = heads.repeat_interleave(groups, 0).flatten(0, 1)  # [A E, D]: a row block per head
    for projection, weight in (
        (attention.q_proj, SHARPNESS * wide),
        (attention.k_proj, SHARPNESS * identity),
        (attention.v_proj, identity),
    ):
        projection.weight.zero_()
        projection.weight[:, :width] = weight
    attention.o_proj.weight.copy_(wide.T * scale / groups)
    layer.input_layernorm.weight.fill_(1.0)
    layer.mlp.down_proj.weight.zero_()


def copy_layer(layer: DrafterLayer, source: Mapping[str, Tensor]) -> None:
    """Copy a target layer; keys and values that heads share are repeated for the wider drafter."""
    for name, ours in layer.state_dict().items():
        theirs = source[name]
        if theirs.shape != ours.shape:
            heads = theirs.unflatten(0, (-1, layer.self_attn.head_dim))
            theirs = heads.repeat_interleave(len(ours) // len(theirs), 0).flatten(0, 1)
        ours.copy_(theirs)
