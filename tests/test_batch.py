"""From samples to slots: shifts, masks and packing, written out by hand."""

import torch
from random_parts import make_sample

from peagle.data.batch import pack, slots_of
from peagle.data.store import Sample


def numbered_sample(mask):
    """Token 10 + p and hidden states p and 100 + p at position p."""
    p = torch.arange(len(mask))
    return Sample(
        input_ids=10 + p,
        loss_mask=torch.tensor(mask, dtype=torch.bool),
        aux=p[:, None].float(),
        final=100 + p[:, None].float(),
    )


def test_slots_follow_vllms_layout():
    slots = slots_of(numbered_sample([0, 0, 1, 1, 1, 1]))
    assert slots["tokens"].tolist() == [11, 12, 13, 14]  # reads x[p+1]
    assert slots["labels"].tolist() == [12, 13, 14, 15]  # guesses x[p+2]
    assert slots["aux"][:, 0].tolist() == [0, 1, 2, 3]  # h[p], not shifted
    assert slots["final"][:, 0].tolist() == [101, 102, 103, 104]  # yields x[p+2]
    assert slots["position"].tolist() == [0, 1, 2, 3]  # not shifted


def test_the_loss_mask_follows_the_token_that_is_read():
    # Slot 0 reads x[1], still the user's: serving never asks for a guess there, although the
    # guessed token x[2] is the assistant's.
    slots = slots_of(numbered_sample([0, 0, 1, 1, 1, 1]))
    assert slots["supervised"].tolist() == [False, True, True, True]


def test_the_users_turn_in_between_is_neither_read_nor_guessed():
    #                                    a  a  u  u  a  a
    slots = slots_of(numbered_sample([0, 1, 1, 0, 0, 1, 1, 1]))
    assert slots["supervised"].tolist() == [True, False, False, False, True, True]


def test_packed_documents_start_again_at_position_zero():
    packed = pack([make_sample(5, 0), make_sample(4, 1)])
    assert packed["document"].tolist() == [0, 0, 0, 1, 1]
    assert packed["position"].tolist() == [0, 1, 2, 0, 1]
    assert len(packed["aux"]) == 5
