"""Drafting a round with a key/value cache, in the slot layout that vLLM serves.

P-EAGLE, one pass:

slot       ...  t-1   t    | t+1 ... t+K-1
token      ...  x_t  x_t+1 |  M  ...   M       x_t+1: sampled by the target, not yet run
hidden     ...  h_t-1 h_t  | mask_hidden ...
guesses              x_t+2 | x_t+3 ... x_t+K+1

EAGLE-3, K passes: the same slots up to t, then each further slot by itself; it reads the guess and
the last state (before the final norm) of the slot before it.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from peagle.decode.kv_cache import SlotCache
from peagle.model.drafter import Drafter
from peagle.model.p_eagle import PEagleDrafter


def new_cache(drafter: Drafter, capacity: int) -> SlotCache:
    """Room for ``capacity`` slots, and one that takes what belongs nowhere."""
    return SlotCache(drafter.config.num_hidden_layers, capacity + 1)


@torch.no_grad()
def draft(
    drafter: Drafter,
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
    at_once = num_tokens if isinstance(drafter, PEagleDrafter) else 1
    states = new_slots(drafter, cache, tokens, aux, start, count, masks=at_once - 1)
    guesses = first_choices(drafter, states)
    if at_once == num_tokens:
        return guesses
    return one_by_one(drafter, cache, states, guesses, start + count - 1, num_tokens=num_tokens)


def new_slots(
    drafter: Drafter,
    cache: SlotCache,
    tokens: Int[Tensor, "B m"],
    aux: Float[Tensor, "B m AD"],
    start: Int[Tensor, " B"],
    count: Int[Tensor, " B"],
    *,
    masks: int,
) -> Float[Tensor, "B k D"]:
    """One pass over the new slots and the mask slots behind; the last states from each row's
    anchor on."""
    batch, width = tokens.shape
    step = torch.arange(width, device=tokens.device)
    real = step < count[:, None]
    spare = cache.capacity - 1
    anchor = start + count - 1
    behind = anchor[:, None] + 1 + torch.arange(masks, device=tokens.device)
    position = torch.cat([torch.where(real, start[:, None] + step, spare), behind], 1)  # [B, q]
    used = int(anchor.max()) + masks + 1
    # Slots that are not real are written to the spare entry; nobody reads it or their output.
    cache.slots.place(position, limit=cache.capacity if not bool(real.all()) else used)

    ops = drafter.ops
    hidden = drafter.combine(aux.flatten(0, 1), ops).view(batch, width, -1)
    embedding = drafter.embed_tokens(tokens)
    if masks:
        mask_hidden, mask_embedding = (
            x[None].expand(batch, masks, -1) for x in drafter.mask_inputs(ops)
        )
        if drafter.config.hidden_state != "shared":
            newest = hidden[torch.arange(batch, device=tokens.device), count - 1]
            depth = torch.arange(1, masks + 1, device=tokens.device).repeat(batch)
            added = drafter.row_states(newest.repeat_interleave(masks, 0), depth)
            mask_hidden = mask_hidden + added.view(batch, masks, -1)
        hidden = torch.cat([hidden, mask_hidden], 1)
        embedding = torch.cat([embedding, mask_embedding], 1)
    states = run_layers(drafter, cache, hidden.flatten(0, 1), embedding.flatten(0, 1))
    states = states.view(batch, width + masks, -1)
    last = states[torch.arange(batch, device=tokens.device), count - 1]
    return torch.cat([last[:, None], states[:, width:]], 1)


def one_by_one(
    drafter: Drafter,
    cache: SlotCache,
    states: Float[Tensor, "B 1 D"],
    guesses: Int[Tensor, "B 1"],
    anchor: Int[Tensor, " B"],
    *,
    num_tokens: int,
) -> Int[Tensor, "B K"]:
    """The guess after the anchor's, from it and its state, and so on: a pass for each."""
    by_depth, used = [guesses], int(anchor.max()) + 1
    for depth in range(1, num_tokens):
        cache.slots.place(anchor[:, None] + depth, limit=used + depth)
        embedding = drafter.embed_tokens(by_depth[-1][:, 0])
        states = run_layers(drafter, cache, states.flatten(0, 1), embedding)[:, None]
        by_depth.append(first_choices(drafter, states))
    return torch.cat(by_depth, 1)


def first_choices(drafter: Drafter, states: Float[Tensor, "B k D"]) -> Int[Tensor, "B k"]:
    """The target's ids of the likeliest tokens."""
    choices = drafter.logits(states.flatten(0, 1)).argmax(-1)
    return drafter.target_ids(choices).view(states.shape[:2])


def run_layers(
    drafter: Drafter,
    cache: SlotCache,
    hidden: Float[Tensor, "T D"],
    embedding: Float[Tensor, "T D"],
) -> Float[Tensor, "T D"]:
    """All layers over the batch's queries, [B * q] in one axis, reading and writing the cache."""
    ops, position = drafter.ops, cache.slots.position
    angles = drafter.rotary.angles(position.flatten(), hidden.dtype)
    mask = cache.slots.visible()[:, None]
    entering: Tensor | None = embedding
    for index, layer in enumerate(drafter.layers):
        x, residual = layer.enter(hidden, entering, ops)
        query, key, value = layer.self_attn(x, ops)
        by_head = [
            t.view(*position.shape, *t.shape[1:]).transpose(1, 2)  # [B, heads, q, E]
            for t in (ops.rotate(query, angles), ops.rotate(key, angles), value)
        ]
        keys, values = cache.update(by_head[1], by_head[2], index)
        context = F.scaled_dot_product_attention(
            by_head[0], keys, values, attn_mask=mask, enable_gqa=query.shape[1] != key.shape[1]
        )
        hidden, entering = layer.leave(residual, context.transpose(1, 2).flatten(0, 1), ops), None
    return hidden
