"""Acceptance lengths with their uncertainty, from runs of several seeds over the same prompts.

The interval is a two-level bootstrap: in each draw, prompts are drawn with replacement, the same
ones for every recipe and seed (all answer the same prompts), and from each recipe's seeds as many
as there are. A ratio is taken within a draw, so that easy and hard prompts cancel. With two or
three seeds the spread between seeds is underestimated: read the interval as that of the prompts,
widened by the seeds there were.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DRAWS = 4000
PEERS = ("eagle3", "speculators")


def accepted(row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Drafts accepted and verifications made, by prompt."""
    return torch.tensor(row["accepted_by_prompt"]), torch.tensor(row["rounds_by_prompt"])


def draw(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Tensor]:
    """Bootstrapped acceptance lengths of each recipe, ``[DRAWS]``; draw ``i`` of all recipes has
    the same prompts.

    Raises:
        ValueError: if runs were measured with different numbers of prompts.
    """
    generator = torch.Generator().manual_seed(0)
    sizes = {len(row["rounds_by_prompt"]) for rows in runs.values() for row in rows}
    if len(sizes) != 1:
        raise ValueError(f"runs of {sorted(sizes)} prompts cannot be compared: measure them alike")
    count = sizes.pop()
    prompts = torch.randint(count, (DRAWS, count), generator=generator)
    found = {}
    for name, rows in runs.items():
        gained, rounds = (
            torch.stack(part).double() for part in zip(*map(accepted, rows), strict=True)
        )
        seeds = torch.randint(len(rows), (DRAWS, len(rows)), generator=generator)
        lengths = torch.stack(
            [
                1 + g[prompts].sum(1) / r[prompts].sum(1)
                for g, r in zip(gained, rounds, strict=True)
            ],
            1,
        )  # [DRAWS, seeds]
        found[name] = lengths.gather(1, seeds).mean(1)
    return found


def interval(draws: Tensor) -> list[float]:
    """The central 95 %."""
    return torch.quantile(draws, draws.new_tensor([0.025, 0.975])).tolist()


def mean_length(rows: Sequence[Mapping[str, Any]]) -> float:
    """Mean over seeds of the acceptance length over all prompts."""
    lengths = [1 + sum(row["accepted_by_prompt"]) / sum(row["rounds_by_prompt"]) for row in rows]
    return sum(lengths) / len(lengths)


def compared(
    runs: Mapping[str, Sequence[Mapping[str, Any]]], reference: str
) -> list[dict[str, Any]]:
    """One line per recipe: its mean, and the ratio to ``reference`` where that was measured."""
    draws, lines = draw(runs), []
    for name, rows in runs.items():
        line = {
            "recipe": name,
            "seeds": len(rows),
            "acceptance_length": mean_length(rows),
            "ci95": interval(draws[name]),
            "ratio": None,
            "ratio_ci95": None,
        }
        if reference in runs and name != reference:
            line["ratio"] = line["acceptance_length"] / mean_length(runs[reference])
            line["ratio_ci95"] = interval(draws[name] / draws[reference])
        lines.append(line)
    return lines


def summary(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The default recipe against its peers; null where one of them was not measured."""
    found: dict[str, Any] = {"acceptance_length": None, "ci95": None}
    if "default" in runs:
        own = next(line for line in compared(runs, "default") if line["recipe"] == "default")
        found = {key: own[key] for key in found}
    for peer in PEERS:
        ratio = {"ratio": None, "ratio_ci95": None}
        if "default" in runs and peer in runs:
            lines = compared({name: runs[name] for name in ("default", peer)}, peer)
            ratio = {key: lines[0][key] for key in ratio}
        found[f"ratio_to_{peer}"] = ratio["ratio"]
        found[f"ratio_to_{peer}_ci95"] = ratio["ratio_ci95"]
    return found
