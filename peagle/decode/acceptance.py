"""Acceptance lengths and speeds: the rows of ``acceptance.json`` from decoding runs."""

from statistics import median
from typing import Any

import torch

from peagle.decode.decoder import Decoded
from peagle.decode.evaluation import Run


def acceptance_rows(runs: list[Run], *, engine: str, dtype: str) -> list[dict[str, Any]]:
    """One row per prompt set, temperature, K and drafter.

    Of several drafters the run's own comes first.
    """
    methods = list(dict.fromkeys(run.method for run in runs if run.method))
    keys = sorted(
        {(r.prompt_set, r.temperature, r.k, methods.index(r.method)) for r in runs if r.method}
    )
    rows = []
    for prompt_set, temperature, k, index in keys:
        compared = [r for r in runs if (r.prompt_set, r.temperature) == (prompt_set, temperature)]
        drafted = [r for r in compared if (r.method, r.k) == (methods[index], k)]
        ours = [run.decoded for run in drafted]
        alone = [run.decoded for run in compared if run.method is None]
        accepted = [per_prompt for decoded in ours for per_prompt in decoded.accepted]
        rows.append(
            {
                "prompt_set": prompt_set,
                "method": methods[index],
                "k": k,
                "temperature": temperature,
                "engine": engine,
                "dtype": dtype,
                "prompts": len(accepted),
                "turns": sum(run.turns for run in drafted),
                "tokens": token_count(ours),
                "acceptance_length": acceptance_length(accepted),
                "acceptance_length_ci95": confidence_interval(accepted),
                "per_position": per_position(accepted, k),
                "accepted_by_prompt": [sum(per_prompt) for per_prompt in accepted],
                "rounds_by_prompt": [len(per_prompt) for per_prompt in accepted],
                "lossless_prompts": equal_outputs(ours, alone) if temperature == 0 else None,
                "tokens_per_second": tokens_per_second(ours),
                "baseline_tokens_per_second": tokens_per_second(alone),
                "draft_ms_per_round": draft_milliseconds(ours),
            }
        )
    return rows


def acceptance_length(accepted: list[list[int]]) -> float:
    """Tokens gained per verification: the accepted drafts and the target's own next token."""
    rounds = sum(len(per_prompt) for per_prompt in accepted)
    return 1 + sum(map(sum, accepted)) / max(rounds, 1)


def per_position(accepted: list[list[int]], k: int) -> list[float]:
    """Share of verifications in which the draft at each position was accepted."""
    counts = torch.tensor([n for per_prompt in accepted for n in per_prompt])
    return [(counts > i).double().mean().item() for i in range(k)]


def confidence_interval(accepted: list[list[int]], draws: int = 1000) -> tuple[float, float]:
    """95% bootstrap interval over prompts: rounds of one prompt are not independent."""
    gained = torch.tensor([float(sum(per_prompt)) for per_prompt in accepted])
    rounds = torch.tensor([float(len(per_prompt)) for per_prompt in accepted])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(accepted), (draws, len(accepted)), generator=generator)
    means = 1 + gained[chosen].sum(1) / rounds[chosen].sum(1).clamp(min=1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975])).tolist()
    return low, high


def equal_outputs(ours: list[Decoded], alone: list[Decoded]) -> int:
    """Prompts whose output with drafter equals the target's own, token for token."""
    pairs = zip(ours, alone, strict=True)
    return sum(a == b for d, e in pairs for a, b in zip(d.tokens, e.tokens, strict=True))


def token_count(decoded: list[Decoded]) -> int:
    return sum(len(tokens) for d in decoded for tokens in d.tokens)


def tokens_per_second(decoded: list[Decoded]) -> float:
    """Of the output, prefill included."""
    return token_count(decoded) / sum(d.seconds for d in decoded)


def draft_milliseconds(decoded: list[Decoded]) -> float | None:
    """The drafter's latency in a round, median; first rounds, which read the prompts, apart.

    ``None`` where no answer was long enough for a second round.
    """
    later = [seconds for d in decoded for seconds in d.draft_seconds[1:]]
    return 1000 * median(later) if later else None
