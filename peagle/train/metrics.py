"""Per-depth accuracy of teacher-forced rollouts (torchmetrics), and its table."""

from typing import NamedTuple

import torch
from jaxtyping import Bool
from torch import Tensor
from torchmetrics import Metric

from peagle.cod.sampling import Rows


class DepthReport(NamedTuple):
    """Per depth: accuracy, accuracy given that the rollout was right so far, rows counted."""

    accuracy: list[float]
    conditional_accuracy: list[float]
    count: list[int]
    acceptance_length: float  # teacher-forced: 1 + mean correct prefix of whole rollouts


class DepthAccuracy(Metric):
    """How often the drafter's first choice is the next token of the data, by depth.

    A token outside the draft vocabulary can never be guessed and counts as a miss. Rollouts are
    conditioned on the data, not on accepted drafts, so the acceptance length that follows is an
    estimate; ``peagle test`` measures the real one.
    """

    full_state_update = False

    def __init__(self, num_depths: int):
        super().__init__()
        self.num_depths = num_depths
        for name in ("correct", "count", "correct_so_far", "reached"):
            zeros = torch.zeros(num_depths, dtype=torch.long)
            self.add_state(name, default=zeros, dist_reduce_fx="sum")
        for name in ("prefix_total", "whole_rollouts"):
            self.add_state(name, default=torch.tensor(0), dist_reduce_fx="sum")

    def update(self, rows: Rows, correct: Bool[Tensor, " N"]) -> None:
        """Add rows sorted by anchor, then depth; every rollout begins at depth 0."""
        depth, hit = rows.depth, correct.long()
        begin = torch.nonzero(depth == 0).flatten()
        rollout = torch.cumsum(depth == 0, 0) - 1
        misses = torch.cumsum(1 - hit, 0)  # counted from the start of the sequence
        before = (misses - (1 - hit))[begin][rollout]  # misses of all earlier rollouts
        right = (misses == before).long()  # the whole prefix up to this row is right
        parent_right = (misses - (1 - hit) == before).long()

        def by_depth(weights: Tensor) -> Tensor:
            sums = torch.zeros_like(self.count)
            return sums.index_add(0, depth, weights)

        self.correct += by_depth(hit)
        self.count += by_depth(torch.ones_like(hit))
        self.correct_so_far += by_depth(right)
        self.reached += by_depth(parent_right)
        lengths = torch.bincount(rollout, minlength=len(begin))
        whole = lengths == self.num_depths
        self.prefix_total += right[whole[rollout]].sum()
        self.whole_rollouts += whole.sum()

    def compute(self) -> DepthReport:
        def share(part: Tensor, of: Tensor) -> list[float]:
            return (part / of.clamp(min=1)).tolist()

        mean_prefix = self.prefix_total / self.whole_rollouts.clamp(min=1)
        return DepthReport(
            share(self.correct, self.count),
            share(self.correct_so_far, self.reached),
            self.count.tolist(),
            1 + float(mean_prefix),
        )


def accuracy_by_depth(rows: Rows, correct: Bool[Tensor, " N"]) -> dict[int, Tensor]:
    """Depth -> share of its rows that are right, for each depth that has rows."""
    depth = rows.depth.to(correct.device)
    hits = correct.new_zeros(len(rows.depth.bincount()), dtype=torch.float32)
    hits.index_add_(0, depth, correct.float())
    counts = rows.depth.bincount().tolist()
    return {d: hits[d] / count for d, count in enumerate(counts) if count}


def logged_names(num_depths: int, *, validated: bool) -> list[str]:
    """What ``PEagleModule`` logs in every ``fit``, with or without validation."""
    depths = [f"accuracy_d{depth}" for depth in range(num_depths)]
    train = [f"train/{name}" for name in ("loss", "accuracy", *depths)]
    val = [f"val/{name}" for name in ("loss", "acceptance_length", *depths)]
    return train + (val if validated else [])


def format_table(header: list[str], rows: list[list[str]]) -> str:
    """Right-aligned columns under a rule, for terminals."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = [
        "  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in lines
    ]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def format_depths(report: DepthReport) -> str:
    """The per-depth table that ``validate`` prints."""
    rows = [
        [str(depth), f"{accuracy:.3f}", f"{conditional:.3f}", str(count)]
        for depth, (accuracy, conditional, count) in enumerate(
            zip(report.accuracy, report.conditional_accuracy, report.count, strict=True)
        )
    ]
    table = format_table(["depth", "accuracy", "given prefix right", "rows"], rows)
    return f"{table}\nteacher-forced acceptance length {report.acceptance_length:.2f}"
