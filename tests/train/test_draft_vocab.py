import pytest
import torch

from peagle.train.draft_vocab import choose_vocabulary

COUNTS = torch.tensor([5, 0, 9, 5, 1])


def test_the_most_frequent_tokens_are_kept_in_ascending_order():
    vocabulary = choose_vocabulary(COUNTS, 3)
    assert vocabulary.token_ids.tolist() == [0, 2, 3]
    assert vocabulary.coverage == pytest.approx(19 / 20)


def test_offsets_lead_from_draft_ids_to_target_ids():
    vocabulary = choose_vocabulary(COUNTS, 3)
    assert (torch.arange(3) + vocabulary.offsets()).tolist() == [0, 2, 3]
    assert vocabulary.membership(5).tolist() == [True, False, True, True, False]


def test_a_full_vocabulary_has_zero_offsets():
    assert choose_vocabulary(COUNTS, None).offsets().tolist() == [0] * 5


@pytest.mark.parametrize("size", [0, 6])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match=r"1\.\.5"):
        choose_vocabulary(COUNTS, size)
