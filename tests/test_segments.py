import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peagle.cod.segments import Segment, partition


def test_equal_anchors_are_cut_into_equal_segments():
    assert partition(torch.ones(12), max_rows=4) == (Segment(0, 4), Segment(4, 8), Segment(8, 12))


def test_one_segment_when_everything_fits():
    assert partition(torch.ones(5), max_rows=5) == (Segment(0, 5),)


def test_a_limit_below_one_rollout_is_refused_with_the_smallest_that_works():
    with pytest.raises(ValueError, match=r"max_rows must hold one rollout \(4\), got 3"):
        partition(torch.tensor([3.4, 1.0]), max_rows=3)


@given(st.lists(st.floats(0, 5), min_size=1, max_size=80), st.integers(5, 40))
def test_segments_cover_every_anchor_once_and_stay_near_the_limit(expected, max_rows):
    rows = torch.tensor(expected)
    segments = partition(rows, max_rows=max_rows)
    assert [a for s in segments for a in range(s.start, s.stop)] == list(range(len(expected)))
    assert all(rows[s.start : s.stop].sum() <= max_rows + 5.001 for s in segments)
