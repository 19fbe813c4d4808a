import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peagle.cod.sampling import Cod, rows_of, sample_rows
from peagle.cod.segments import Segment, partition, pieces

ROW_UNIT = 64  # as on the CPU and on CUDA


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


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=400),
    st.integers(1, 12),
)
def test_every_row_is_in_one_piece_and_rollouts_stay_whole(lengths, count):
    rows = rows_of(torch.tensor(lengths))
    found = list(pieces(rows, [Segment(0, 1)] * count, unit=ROW_UNIT))
    for index, field in enumerate(rows):
        assert torch.equal(torch.cat([field[:0], *(piece.rows[index] for piece in found)]), field)
    for piece in found:
        own = piece.rows.mtp()
        assert all(torch.equal(a[: len(b)], b) for a, b in zip(piece.mtp, own, strict=True))
        assert len(piece.rows.anchor) == 0 or piece.rows.depth[0] == 0
        begins = piece.mtp.depth == 1
        follows = piece.mtp.depth[1:] == piece.mtp.depth[:-1] + 1
        assert len(begins) == 0 or (begins[0] and (begins[1:] | follows).all())
        assert len(piece.mtp.anchor) - len(own.anchor) < 6


def test_pieces_of_long_sequences_have_equally_many_rows_in_whole_units():
    cod = Cod(8, 0.7, 0.2)
    rows = sample_rows(
        torch.ones(4096, dtype=torch.bool),
        torch.zeros(4096, dtype=torch.long),
        cod=cod,
        generator=torch.Generator().manual_seed(0),
    )
    segments = partition(torch.full((4096,), 3.37), max_rows=870)
    *most, last = (len(piece.mtp.anchor) for piece in pieces(rows, segments, unit=ROW_UNIT))
    mean = len(rows.mtp().anchor) / len(segments)
    assert len(segments) == 16 and len(set(most)) == 1
    assert most[0] % ROW_UNIT == 0 and mean - ROW_UNIT < most[0] <= mean
    assert 0 < last <= most[0]


def test_no_piece_is_made_for_a_small_rest():
    rows = rows_of(torch.full((2548,), 4))  # a mean of 1911 deeper rows, of 29.9 units
    found = list(pieces(rows, [Segment(0, 1)] * 4, unit=ROW_UNIT))
    assert [len(piece.mtp.anchor) for piece in found] == [1920, 1920, 1920, 1884]
    rows = rows_of(torch.full((112,), 4))  # a mean of 84: two units would be half again as much
    assert len(next(pieces(rows, [Segment(0, 1)] * 4, unit=ROW_UNIT)).mtp.anchor) == 64


def test_one_segment_is_one_piece():
    rows = rows_of(torch.full((500,), 4))
    (piece,) = pieces(rows, [Segment(0, 500)])
    assert len(piece.rows.anchor) == 2000 and len(piece.mtp.anchor) == 1500


@pytest.mark.parametrize("alone", [1, 3000], ids=["all", "many"])
def test_rows_of_depth_zero_that_stand_alone_are_limited_too(alone):
    lengths = torch.ones(8192, dtype=torch.long)
    if alone > 1:
        lengths[alone:] = 4
    rows = rows_of(lengths)
    found = list(pieces(rows, [Segment(0, 1)] * 16, unit=ROW_UNIT))
    assert 15 <= len(found) <= 20
    assert max(len(piece.rows.anchor) for piece in found) <= len(rows.anchor) / 16 + ROW_UNIT


def test_segments_below_a_unit_fill_nothing_up():
    rows = rows_of(torch.full((40,), 4))
    found = list(pieces(rows, [Segment(10 * i, 10 * i + 10) for i in range(4)], unit=ROW_UNIT))
    assert [len(piece.mtp.anchor) for piece in found] == [30] * 4
    assert [len(piece.rows.anchor) for piece in found] == [40] * 4
