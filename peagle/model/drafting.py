"""One drafting pass with a key/value cache, in the slot layout that vLLM serves.

slot       ...  t-1   t    | t+1 ... t+K-1
token      ...  x_t  x_t+1 |  M  ...   M       x_t+1: sampled by the target, not yet run
hidden     ...  h_t-1 h_t  | mask_hidden ...
guesses              x_t+2 | x_t+3 ... x_t+K+1
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from peagle.model.drafter import PEagleDrafter
from peagle.model.layers import rotate
from peagle.model.slot_cache import SlotCache


def new_cache(drafter: PEagleDrafter, capacity: int) -> SlotCache:
    """Room for ``capacity`` slots, and one that takes what belongs nowhere."""
    return SlotCache(drafter.config.num_hidden_layers, capacity + 1)


@torch.no_grad()
def draft(
    drafter: PEagleDrafter,
    cache: SlotCache,
    tokens: Int[Tensor, "B m"],
    aux: Float[Tensor, "B m AD"],
    start: Int[Tensor, " B"],
    count: Int[Tensor, " B"],
    *,
    num_tokens: int,
) -> Int[Tensor, "B K"]:
    """Guess the next ``num_tokens`` tokens after the newest slots.

    Args:
        tokens: what the new slots read, ``x[p+1]``; only the first ``count`` of a row are real.
        aux: the target's hidden states at the new slots.
        start: position of the first new slot of each row.
        count: how many new slots each row has, at least 1.
    """
    batch, width = tokens.shape
    step = torch.arange(width, device=tokens.device)
    real = step < count[:, None]
    spare = cache.capacity - 1
    anchor = start + count - 1
    masks = anchor[:, None] + 1 + torch.arange(num_tokens - 1, device=tokens.device)
    position = torch.cat([torch.where(real, start[:, None] + step, spare), masks], 1)  # [B, q]
    used = int(masks.max() if num_tokens > 1 else anchor.max()) + 1
    # Slots that are not real are written to the spare entry; nobody reads it or their output.
    cache.slots.place(position, limit=cache.capacity if not bool(real.all()) else used)

    mask_hidden, mask_embedding = drafter.mask_inputs()
    known = drafter.combine(aux.flatten(0, 1)).view(batch, width, -1)
    count_masks = (batch, num_tokens - 1, known.shape[-1])
    guessed = mask_hidden[None].expand(*count_masks)
    if drafter.config.hidden_state != "shared":
        newest = known[torch.arange(batch, device=tokens.device), count - 1]
        depth = torch.arange(1, num_tokens, device=tokens.device).repeat(batch)
        added = drafter.row_states(newest.repeat_interleave(num_tokens - 1, 0), depth)
        guessed = guessed + added.view(*count_masks)
    hidden = torch.cat([known, guessed], 1)
    embedding = torch.cat(
        [drafter.embed_tokens(tokens), mask_embedding[None].expand(*count_masks)], 1
    )
    states = run_layers(drafter, cache, hidden.flatten(0, 1), embedding.flatten(0, 1))
    states = states.view(batch, width + num_tokens - 1, -1)
    last = states[torch.arange(batch, device=tokens.device), count - 1]
    guesses = torch.cat([last[:, None], states[:, width:]], 1)
    return drafter.target_ids(drafter.logits(guesses.flatten(0, 1)).argmax(-1)).view(batch, -1)


def run_layers(
    drafter: PEagleDrafter,
    cache: SlotCache,
    hidden: Float[Tensor, "T D"],
    embedding: Float[Tensor, "T D"],
) -> Float[Tensor, "T D"]:
    """All layers over the batch's queries, [B * q] in one axis, reading and writing the cache."""
    position = cache.slots.position
    angles = drafter.rotary.angles(position.flatten(), hidden.dtype)
    mask = cache.slots.visible()[:, None]
    entering: Tensor | None = embedding
    for index, layer in enumerate(drafter.layers):
        x, residual = layer.enter(hidden, entering)
        query, key, value = layer.self_attn(x)
        by_head = [
            t.view(*position.shape, *t.shape[1:]).transpose(1, 2)  # [B, heads, q, E]
            for t in (rotate(query, angles), rotate(key, angles), value)
        ]
        keys, values = cache.update(by_head[1], by_head[2], index)
        context = F.scaled_dot_product_attention(
            by_head[0], keys, values, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
        )
        hidden, entering = layer.leave(residual, context.transpose(1, 2).flatten(0, 1)), None
    return hidden
