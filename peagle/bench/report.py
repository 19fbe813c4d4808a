"""From answers to figures: the rows of ``bench.json``, the table on screen, the best K."""

from typing import Any, NamedTuple

import torch

from peagle.bench.client import Answer, Counters
from peagle.train.metrics import format_table

Row = dict[str, Any]


class NamedDrafter(NamedTuple):
    """A drafter's folder, and what rows call it."""

    folder: str
    method: str


class Measurement(NamedTuple):
    """One prompt set asked at one concurrency, with K drafts per round (0: no drafter)."""

    prompt_set: str
    drafter: NamedDrafter | None
    k: int
    concurrency: int
    prompts: int  # different ones; each is asked equally often
    answers: list[Answer]
    seconds: float
    counters: Counters

    @property
    def tokens(self) -> int:
        return sum(len(answer.tokens) for answer in self.answers)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class Conditions(NamedTuple):
    """What every row says about how it was measured."""

    engine: str
    hardware: str
    dtype: str
    temperature: float


def bench_rows(measurements: list[Measurement], conditions: Conditions) -> list[Row]:
    """One row per measurement; those with a drafter are compared with the one without.

    Drafters keep the order in which they were measured.
    """
    alone = {(m.prompt_set, m.concurrency): m for m in measurements if m.k == 0}
    drafters = list(dict.fromkeys(m.drafter for m in measurements))
    order = sorted(
        measurements,
        key=lambda m: (m.prompt_set, m.concurrency, drafters.index(m.drafter), m.k),
    )
    return [bench_row(m, alone[m.prompt_set, m.concurrency], conditions) for m in order]


def bench_row(m: Measurement, alone: Measurement, conditions: Conditions) -> Row:
    latency = [answer.seconds for answer in m.answers]
    return {
        "prompt_set": m.prompt_set,
        "method": m.drafter.method if m.drafter else None,
        "k": m.k or None,
        "temperature": conditions.temperature,
        "engine": conditions.engine,
        "hardware": conditions.hardware,
        "dtype": conditions.dtype,
        "prompts": m.prompts,
        "requests": len(m.answers),
        "tokens": m.tokens,
        **acceptance(m, alone, conditions.temperature),
        "tokens_per_second": m.tokens_per_second,
        "baseline_tokens_per_second": alone.tokens_per_second,
        "concurrency": m.concurrency,
        "drafter": m.drafter.folder if m.drafter else None,
        "latency_p50_s": quantile(latency, 0.50),
        "latency_p95_s": quantile(latency, 0.95),
        "latency_p99_s": quantile(latency, 0.99),
        "ttft_p50_s": quantile([answer.first_token_seconds for answer in m.answers], 0.50),
        "speedup": m.tokens_per_second / alone.tokens_per_second if m.k else None,
    }


def acceptance(m: Measurement, alone: Measurement, temperature: float) -> Row:
    """By the engine's own counters; without a drafter there is nothing to accept."""
    if not m.k:
        return {"acceptance_length": None, "per_position": None, "lossless_prompts": None}
    drafts = max(m.counters.drafts, 1)
    first = zip(m.answers[: m.prompts], alone.answers[: m.prompts], strict=True)
    same = sum(ours.tokens == theirs.tokens for ours, theirs in first)
    return {
        "acceptance_length": 1 + m.counters.accepted / drafts,
        "per_position": [count / drafts for count in m.counters.per_position],
        "lossless_prompts": same if temperature == 0 else None,
    }


def quantile(values: list[float], q: float) -> float:
    return float(torch.quantile(torch.tensor(values, dtype=torch.float64), q))


def best_k(rows: list[Row]) -> list[Row]:
    """The fastest row of each prompt set and concurrency; its ``k`` is ``None`` when no drafter
    was faster than all K."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row["prompt_set"], row["concurrency"])
        if key not in best or row["tokens_per_second"] > best[key]["tokens_per_second"]:
            best[key] = row
    return list(best.values())


def format_bench(rows: list[Row]) -> str:
    header = ["prompts", "at once", "drafter", "K", "tok/s", "speed-up", "accepted", "by position"]
    header += ["same output", "latency p50/p95/p99", "first token"]
    lines = []
    for row in rows:
        drafted = row["drafter"] is not None
        same = row["lossless_prompts"]
        latency = (row[f"latency_{q}_s"] for q in ("p50", "p95", "p99"))
        lines.append(
            [
                f"{row['prompt_set']} ({row['prompts']})",
                str(row["concurrency"]),
                row["method"] or "none",
                str(row["k"]) if drafted else "",
                f"{row['tokens_per_second']:.1f}",
                f"{row['speedup']:.2f}" if drafted else "",
                f"{row['acceptance_length']:.2f}" if drafted else "",
                " ".join(f"{share:.2f}" for share in row["per_position"] or ()),
                "" if same is None else f"{same}/{row['prompts']}",
                " / ".join(f"{seconds:.2f}" for seconds in latency) + " s",
                f"{row['ttft_p50_s']:.3f} s",
            ]
        )
    return format_table(header, lines)


def format_best(rows: list[Row]) -> str:
    return "\n".join(
        f"best for {row['prompt_set']} with {row['concurrency']} at once: "
        + ("no drafter" if row["k"] is None else f"{row['method']}, K = {row['k']}")
        + f" ({row['tokens_per_second']:.1f} tok/s)"
        for row in best_k(rows)
    )
