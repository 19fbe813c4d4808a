"""A memory budget turned into rows per segment."""

import re

import pytest
from random_parts import make_drafter

from peagle.model.config import PEagleConfig
from peagle.model.memory import parameters, rows_within

SETTINGS = {"slots": 64, "rollout": 8, "element": 4, "recompute": False}


def large(**changes):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    width = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 8192}
    return PEagleConfig(num_hidden_layers=4, **width, **heads, **changes)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 4}, {"draft_vocab_size": 20}])
def test_the_weights_are_counted(changes):
    drafter = make_drafter(**changes)
    matrices = sum(p.numel() for p in drafter.parameters() if p.ndim == 2)
    assert parameters(drafter.config) == matrices


def rows(gigabytes, **changes):
    settings = {**SETTINGS, "slots": 4096, **changes}
    return rows_within(gigabytes, large(), **settings)


def test_more_memory_means_more_rows_and_longer_sequences_leave_fewer():
    assert 2 * rows(4.0) < rows(8.0)  # what does not depend on the segment is paid once
    assert rows(4.0, slots=8192) < rows(4.0)
    assert rows(4.0, element=2) > rows(4.0)
    assert rows(4.0, recompute=True) > rows(4.0)


def test_rows_of_eagle3_keep_their_attention_weights():
    budget = {"slots": 4096, "rollout": 8, "element": 4, "recompute": False}
    kept = {
        parallel: rows_within(8.0, large(parallel_drafting=parallel), **budget)
        for parallel in (True, False)
    }
    assert kept[False] < kept[True] / 2  # 4 layers of 8 heads over 4,096 slots: 0.5 MB a row


def test_a_budget_below_one_segment_names_the_smallest_that_works():
    with pytest.raises(ValueError, match=r"0\.001 cannot hold one segment of 64 slots") as error:
        rows_within(0.001, large(), **SETTINGS)
    least = float(re.search(r"at least ([\d.]+)", str(error.value))[1])
    assert rows_within(least, large(), **SETTINGS) >= 8
    with pytest.raises(ValueError, match=f"at least {least:g}"):
        rows_within(least - 0.02, large(), **SETTINGS)
