"""The EAGLE-3 drafter (arXiv 2503.01840), our baseline: one token after the other, K passes.

A row of depth ``d >= 1`` stands at the same position as in P-EAGLE and sees the same rows. It reads
the token before the one it guesses, and as hidden state the drafter's own last state (before the
final norm) of the row before it. In training that token is the data's, and the rows of a depth wait
for those of the depth before: training-time test.

    row      (a, 0)           (a, 1)            (a, 2)
    token    x[a+1]           x[a+2]            x[a+3]
    hidden   fc(h[a])         state of (a, 0)   state of (a, 1)
    guesses  x[a+2]           x[a+3]            x[a+4]
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peagle.cod.sampling import Rows
from peagle.kernels.device import without_autocast
from peagle.kernels.precision import at_least_float32
from peagle.kernels.reference import Reference
from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter, NTPStates

BLOCK_ROWS = 256  # rows whose scores are taken at once: what lies behind their anchors is left out


class Eagle3Drafter(Drafter):
    """Guesses one token per pass, from its own last state."""

    def __init__(self, config: PEagleConfig):
        if config.parallel_drafting:
            raise ValueError("this is the configuration of a p-eagle drafter, not of an eagle3 one")
        super().__init__(config)
        self.post_init()

    def embedded(self, tokens: Int[Tensor, " S"]) -> Float[Tensor, "S D"]:
        return self.embed_tokens(tokens)

    def mtp_inputs(
        self,
        embedding: Float[Tensor, "S D"],
        hidden: Float[Tensor, "S D"],
        mask: Float[Tensor, "_ D"],
        ops: Reference,
    ) -> Float[Tensor, "S D"]:
        """The slots' embeddings: a row at position p reads the token of slot p."""
        return embedding

    def mtp_forward(
        self,
        rows: Rows,
        ntp: NTPStates,
        position: Int[Tensor, " S"],
        document: Int[Tensor, " S"],
        ops: Reference,
    ) -> Float[Tensor, "M D"]:
        """Run rows of depth >= 1, depth by depth; each rollout is a hole-free prefix 1..d."""
        device, dtype = position.device, ntp.keys[0].dtype
        hidden, before = ntp.hidden, torch.arange(len(document))  # of every slot
        pairs: list[Pairs | None] = [None] * len(self.layers)
        found, order = [], []
        for depth in range(1, int(rows.depth.max()) + 1):
            here = torch.nonzero(rows.depth == depth).flatten()
            anchor = rows.anchor[here]
            going_on = torch.searchsorted(before, anchor).to(device)
            slots = (anchor + depth).to(device)
            angles = self.rotary.angles(position[slots], dtype)
            blocks = blocks_of(anchor, document, device=device)
            hidden, embedding = hidden[going_on], ntp.mtp_inputs[slots]
            for index, layer in enumerate(self.layers):
                x, residual = layer.enter(hidden, embedding if index == 0 else None, ops)
                query, key, value = layer.self_attn(x, ops)
                own = grown(pairs[index], going_on, ops.rotate(key, angles), value.to(dtype))
                pairs[index] = own
                ntp_pairs = Pairs(ntp.keys[index], ntp.values[index])
                context = chain_attention(ops.rotate(query, angles), own, ntp_pairs, blocks)
                hidden = layer.leave(residual, context.to(value.dtype), ops)
            before = anchor
            found.append(hidden)
            order.append(here)
        where = torch.cat(order).argsort().to(device)
        return torch.cat(found)[where]


class Pairs(NamedTuple):
    """Keys and values: of all slots [S, G, E], or of each rollout's rows so far [M, d, G, E]."""

    key: Float[Tensor, "... G E"]
    value: Float[Tensor, "... G E"]


def grown(
    pairs: Pairs | None,
    going_on: Int[Tensor, " M"],
    key: Float[Tensor, "M G E"],
    value: Float[Tensor, "M G E"],
) -> Pairs:
    """The pairs of the rollouts that go on, with those of their new rows."""
    if pairs is None:
        return Pairs(key[:, None], value[:, None])
    return Pairs(
        torch.cat([pairs.key[going_on], key[:, None]], 1),
        torch.cat([pairs.value[going_on], value[:, None]], 1),
    )


class RowBlock(NamedTuple):
    """Rows of one depth and document, and the slots before the last of their anchors."""

    rows: slice
    slots: slice
    hidden: Bool[Tensor, "m s"]  # the slots behind a row's own anchor


def blocks_of(
    anchor: Int[Tensor, " M"], document: Int[Tensor, " S"], *, device: torch.device
) -> list[RowBlock]:
    """Cut rows of one depth, sorted by anchor, so that a block stays within a document."""
    number = document[anchor]
    cuts = [0, *(torch.nonzero(number[1:] != number[:-1]).flatten() + 1).tolist(), len(anchor)]
    blocks = []
    for start, stop in pairwise(cuts):
        begin = int(torch.searchsorted(document, number[start]))
        for first in range(start, stop, BLOCK_ROWS):
            last = min(first + BLOCK_ROWS, stop)
            slots = torch.arange(begin, int(anchor[last - 1]) + 1)
            hidden = (slots > anchor[first:last, None]).to(device)
            blocks.append(RowBlock(slice(first, last), slice(begin, begin + len(slots)), hidden))
    return blocks


def chain_attention(
    query: Float[Tensor, "M A E"], own: Pairs, ntp_pairs: Pairs, blocks: list[RowBlock]
) -> Float[Tensor, "M A E"]:
    """Every row sees its document's depth-0 slots up to its anchor, and its rollout so far.

    The scores are kept for the backward pass, [heads, rows, slots] for every depth and layer: less
    than the rest of a row while documents are short, and bounded by the rows of a segment.
    """
    by_group = query.unflatten(1, (ntp_pairs.key.shape[1], -1))  # [M, G, R, E]
    parts = []
    with without_autocast(query.device):
        for rows, slots, hidden in blocks:
            asked = by_group[rows] * query.shape[-1] ** -0.5
            known, mine = torch.einsum("mgre,sge->grms", asked, ntp_pairs.key[slots]), own.key[rows]
            known = known.masked_fill(hidden, -torch.inf)
            scores = torch.cat([known, torch.einsum("mgre,mdge->grmd", asked, mine)], -1)
            weights = torch.softmax(scores, -1, dtype=at_least_float32(scores.dtype)).to(
                query.dtype
            )
            count = known.shape[-1]
            context = torch.einsum("grms,sge->mgre", weights[..., :count], ntp_pairs.value[slots])
            mine = torch.einsum("grmd,mdge->mgre", weights[..., count:], own.value[rows])
            parts.append((context + mine).flatten(1, 2))
    return torch.cat(parts)
