import pytest
import torch

from peagle.cod.sampling import Rows
from peagle.train.metrics import DepthAccuracy, accuracy_by_depth, format_depths


def metric_of(*rollouts, num_depths=3):
    """Rollouts as strings of hits: "101" is right, wrong, right."""
    rows = [(a, d) for a, hits in enumerate(rollouts) for d in range(len(hits))]
    anchor, depth = map(torch.tensor, zip(*rows, strict=True))
    metric = DepthAccuracy(num_depths)
    metric.update(Rows(anchor, depth), torch.tensor([h == "1" for r in rollouts for h in r]))
    return metric


def test_accuracies_are_those_counted_by_hand():
    report = metric_of("110", "011", "111", "1", "10").compute()
    assert report.count == [5, 4, 3]
    assert report.accuracy == pytest.approx([4 / 5, 3 / 4, 2 / 3])
    # Given that the prefix was right: depth 1 after 4 right starts (one has no depth 1): 2 of 3;
    # depth 2 after "11": "110", "111": 1 of 2.
    assert report.conditional_accuracy == pytest.approx([4 / 5, 2 / 3, 1 / 2])


def test_acceptance_length_is_one_plus_the_mean_prefix_of_whole_rollouts():
    report = metric_of("110", "011", "111", "1", "10").compute()
    assert report.acceptance_length == pytest.approx(1 + (2 + 0 + 3) / 3)


def test_two_updates_equal_one():
    both = metric_of("110", "011", "10")
    other = metric_of("110")
    other.update(Rows(torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 1])),
                 torch.tensor([False, True, True, True, False]))  # fmt: skip
    assert other.compute() == both.compute()


def test_the_table_shows_every_depth():
    lines = format_depths(metric_of("110", "011").compute()).splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert lines[-1] == "teacher-forced acceptance length 2.00"


def test_a_run_in_half_precision_counts_as_any_other():
    """Lightning's precision ``bf16-true`` makes new tensors bf16 while it trains."""
    rows = Rows(torch.zeros(3, dtype=torch.long), torch.tensor([0, 0, 1]))
    right = torch.tensor([True, False, True])
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = accuracy_by_depth(rows, right)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == {0: 0.5, 1: 1.0}
