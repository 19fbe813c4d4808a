"""From samples to slots: shifts, masks and packing, written out by hand."""

from contextlib import suppress

import pytest
import torch
from random_parts import make_sample

from peagle.store.errors import BadSample
from peagle.store.reader import Store
from peagle.store.sample import Sample
from peagle.train.buffers import Buffers
from peagle.train.packing import StatesInPlace, joined, pack, slots_of


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


@pytest.mark.parametrize("members", [(4,), (0, 1), (3, 0, 5, 1), (2, 5)])
def test_samples_read_in_place_are_packed_as_copies_are_and_not_copied(random_store, members):
    store = Store(random_store)
    copies = pack([store.read(i) for i in members])
    slots = sum(store.entries[i].tokens - 2 for i in members)
    states = StatesInPlace(slots, store.manifest, Buffers())
    packed = pack([states.read(store, i) for i in members])
    assert packed.keys() == copies.keys()
    assert all(torch.equal(packed[name], copies[name]) for name in copies)
    assert packed["aux"].data_ptr() == states.aux.data_ptr()
    assert packed["final"].data_ptr() == states.final[1].data_ptr()


@pytest.mark.parametrize("bad", range(4))
def test_a_bad_sample_leaves_no_trace_in_its_neighbours(random_store, bad):
    store = Store(random_store)
    members = [3, 0, 5, 1]
    good = [i for i in members if i != members[bad]]
    copies = pack([store.read(i) for i in good])
    entry = store.entries[members[bad]]
    store.entries[members[bad]] = entry._replace(hashes=(*entry.hashes[:3], "0" * 16))
    states = StatesInPlace(
        sum(store.entries[i].tokens - 2 for i in members), store.manifest, Buffers()
    )
    samples = []
    for i in members:
        with suppress(BadSample):
            samples.append(states.read(store, i))
    assert len(samples) == 3
    packed = pack(samples)
    assert all(torch.equal(packed[name], copies[name]) for name in copies)


def test_parts_with_something_between_them_are_copied_together():
    memory = torch.arange(12).view(6, 2)
    assert joined([memory[1:3], memory[3:6]]).data_ptr() == memory[1:].data_ptr()
    assert joined([memory[0:2], memory[3:4]]).tolist() == [[0, 1], [2, 3], [6, 7]]
    assert joined([memory[2:3], memory[0:2]]).tolist() == [[4, 5], [0, 1], [2, 3]]
    assert joined([memory[0:2, 0], memory[1:3, 0]]).tolist() == [0, 2, 2, 4]
