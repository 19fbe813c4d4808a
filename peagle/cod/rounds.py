"""Where rounds of drafting would start in a text, by the guesses that a drafter has right in it.

In decoding a draft begins where the last one ended: after the accepted guesses and the target's
own next token. Training looks at every position alike, and so mostly at ones that no round starts
at. A target's answers are its own already; this is what is left of being on-policy.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from peagle.cod.sampling import Rows


def right_prefix(rows: Rows, correct: Bool[Tensor, " N"], num_slots: int) -> Int[Tensor, " S"]:
    """How many guesses of each anchor are right before the first wrong one."""
    begin = torch.nonzero(rows.depth == 0).flatten()
    rollout = torch.cumsum(rows.depth == 0, 0) - 1
    misses = torch.cumsum(~correct, 0)
    before = (misses - (~correct).long())[begin]  # of all earlier rollouts
    right = (misses == before[rollout]).long()
    return torch.zeros(num_slots, dtype=torch.long).index_add(0, rows.anchor, right)


def round_starts(
    rows: Rows,
    correct: Bool[Tensor, " N"],
    supervised: Bool[Tensor, " S"],
    document: Int[Tensor, " S"],
) -> Bool[Tensor, " S"]:
    """Anchors from which a round starts, when every document is decoded as it stands.

    The first supervised slot of an answer starts one. A slot reads the pending token: with ``n``
    right guesses the next round's stands ``n + 1`` slots further, or where the next answer begins.

        right guesses   2  0  1  0  0  3  1
        starts          x  .  .  x  x  x  .
    """
    ahead = (right_prefix(rows, correct, len(supervised)) + 1).tolist()
    alive, place = supervised.tolist(), document.tolist()
    starts, due = [False] * len(alive), 0
    for slot in range(len(alive)):
        begins = slot == 0 or not alive[slot - 1] or place[slot - 1] != place[slot]
        if alive[slot] and (begins or slot == due):
            starts[slot], due = True, slot + ahead[slot]
    return torch.tensor(starts, dtype=torch.bool)
