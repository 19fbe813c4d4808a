from collections import Counter, defaultdict

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peagle.cod.sampling import Cod, Rows, expected_rows, reach, sample_rows


def sample(supervised, document=None, *, num_depths=4, keep_ratio=0.7, floor=0.0, seed=0):
    return sample_rows(
        torch.tensor(supervised, dtype=torch.bool),
        torch.tensor(document if document is not None else [0] * len(supervised)),
        cod=Cod(num_depths, keep_ratio, floor),
        generator=torch.Generator().manual_seed(seed),
    )


def table(rows: Rows) -> dict[int, list[int]]:
    """Anchors by depth."""
    found = defaultdict(list)
    for anchor, depth in zip(rows.anchor.tolist(), rows.depth.tolist(), strict=True):
        found[depth].append(anchor)
    return dict(found)


def test_keeping_everything_yields_one_triangle_per_document():
    rows = sample([1] * 6, [0, 0, 0, 0, 1, 1], num_depths=3, keep_ratio=1.0)
    assert table(rows) == {0: [0, 1, 2, 3, 4, 5], 1: [0, 1, 2, 4], 2: [0, 1]}


@pytest.mark.parametrize("seed", range(5))
def test_sixteen_positions_are_thinned_as_in_the_paper(seed):
    # Section 2.2: n = 16, K = 4, r = 0.7 keeps 16 + 10 + 7 + 5 = 38 elements.
    kept = table(sample([1] * 16, seed=seed))
    assert [len(kept[d]) for d in range(4)] == [16, 10, 7, 5]


def test_the_sets_drawn_in_the_paper_are_one_of_our_draws():
    positions = {  # G1, G2, G3 of section 2.2: the positions kept at each depth
        1: {1, 3, 4, 6, 7, 9, 10, 12, 14, 15},
        2: {2, 5, 7, 8, 11, 13, 15},
        3: {3, 6, 9, 12, 14},
    }
    for depth in (2, 3):
        assert all(p - 1 in positions[depth - 1] for p in positions[depth])
    anchors = {d: {p - d for p in kept} for d, kept in positions.items()}
    assert anchors[3] <= anchors[2] <= anchors[1]
    ours = table(sample([1] * 16))
    assert [len(anchors[d]) for d in (1, 2, 3)] == [len(ours[d]) for d in (1, 2, 3)]


def test_an_unsupervised_slot_ends_every_rollout_that_reaches_it():
    rows = sample([1, 1, 0, 1, 1, 1], num_depths=3, keep_ratio=1.0)
    assert table(rows) == {0: [0, 1, 3, 4, 5], 1: [0, 3, 4], 2: [3]}


def test_rows_are_sorted_by_anchor_then_depth():
    rows = sample([1] * 40, [0] * 20 + [1] * 20)
    assert torch.equal(
        torch.argsort(rows.anchor * 100 + rows.depth), torch.arange(len(rows.anchor))
    )


def test_the_same_generator_state_draws_the_same_rows():
    first, second, other = (sample([1] * 64, seed=s) for s in (3, 3, 4))
    assert torch.equal(first.anchor, second.anchor)
    assert not torch.equal(first.anchor, other.anchor)


def test_every_anchor_is_equally_likely_to_survive():
    counts = torch.zeros(20)
    for seed in range(2000):
        rows = sample([1] * 20, num_depths=3, keep_ratio=0.5, seed=seed)
        counts += torch.bincount(rows.anchor[rows.depth == 1], minlength=20)
    share = counts[:19] / 2000  # 9 of the 19 anchors that have a depth 1
    assert torch.allclose(share, torch.full((19,), 9 / 19), atol=0.06)


@pytest.mark.parametrize("lengths", [[12] * 50, [12] * 10 + [100, 40]])
def test_short_documents_get_their_share_of_deep_rows(lengths):
    document = [number for number, length in enumerate(lengths) for _ in range(length)]
    kept = table(sample([1] * len(document), document, num_depths=8, keep_ratio=0.7))
    candidates = len(document) - len(lengths)  # a document's last anchor has no depth 1
    assert [len(kept[d]) for d in range(1, 8)] == [int(candidates * 0.7**d) for d in range(1, 8)]
    first = Counter(document[anchor] for anchor in kept[1])
    for number, length in enumerate(lengths):  # each document to about a row
        assert abs(first[number] - 0.7 * (length - 1)) < 2


def test_no_place_in_a_pack_is_favoured():
    deepest = torch.zeros(5)
    document = [number for number in range(5) for _ in range(9)]
    for seed in range(400):
        kept = table(sample([1] * 45, document, num_depths=5, keep_ratio=0.5, seed=seed))
        for anchor in kept[4]:
            deepest[document[anchor]] += 1
    assert torch.allclose(deepest / 400, torch.full((5,), 2 / 5), atol=0.13)  # int(40 / 16) = 2


def test_the_floor_keeps_deep_depths_alive():
    kept = table(sample([1] * 101, num_depths=8, keep_ratio=0.5, floor=0.2))
    counts = [len(kept[d]) for d in range(8)]
    assert counts[:4] == [101, 50, 25, 20]
    assert all(20 - (d - 3) <= counts[d] <= 20 for d in range(4, 8))  # only the end loses some


sequences = st.lists(
    st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60
)  # (supervised, starts a new document)


@settings(deadline=None, max_examples=200)
@given(sequences, st.integers(1, 8), st.floats(0.05, 1.0), st.floats(0.0, 1.0), st.integers(0, 9))
def test_no_rollout_has_a_hole_or_leaves_its_document(slots, num_depths, ratio, floor, seed):
    supervised = [s for s, _ in slots]
    document = torch.cumsum(torch.tensor([int(new) for _, new in slots]), 0).tolist()
    rows = sample(
        supervised, document, num_depths=num_depths, keep_ratio=ratio, floor=floor, seed=seed
    )
    pairs = set(zip(rows.anchor.tolist(), rows.depth.tolist(), strict=True))
    assert len(pairs) == len(rows.anchor)
    assert {a for a, d in pairs if d == 0} == {a for a, s in enumerate(supervised) if s}
    for anchor, depth in pairs:
        assert 0 <= anchor and anchor + depth < len(slots)
        assert document[anchor] == document[anchor + depth]
        assert supervised[anchor + depth]
        assert depth == 0 or (anchor, depth - 1) in pairs


@pytest.mark.parametrize("lengths", [[200], [12] * 20, [3, 90, 5, 5, 14]])
def test_expected_rows_agree_with_the_mean_of_many_draws(lengths):
    document = torch.repeat_interleave(torch.tensor(lengths))
    supervised = torch.ones_like(document, dtype=torch.bool)
    expected = expected_rows(supervised, document, cod=Cod(6, 0.8))
    drawn = torch.zeros_like(expected)
    for seed in range(300):
        anchors = sample(
            supervised.tolist(), document.tolist(), num_depths=6, keep_ratio=0.8, seed=seed
        ).anchor
        drawn += torch.bincount(anchors, minlength=len(drawn)) / 300
    assert abs(drawn.sum() - expected.sum()) < 0.01 * expected.sum()
    assert (drawn - expected).abs().max() < 0.45


def test_reach_counts_slots_to_the_end_of_the_supervised_run():
    supervised = torch.tensor([0, 1, 1, 1, 0, 1], dtype=torch.bool)
    assert reach(supervised, torch.zeros(6, dtype=torch.long), 9).tolist() == [0, 3, 2, 1, 0, 1]


@pytest.mark.parametrize("values", [(0, 0.8, 0.0), (8, 0.0, 0.0), (8, 1.5, 0.0), (8, 0.8, -0.1)])
def test_settings_outside_their_range_are_refused(values):
    with pytest.raises(ValueError, match="must"):
        Cod(*values)
