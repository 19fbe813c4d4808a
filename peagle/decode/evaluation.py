"""What ``test`` measures: prompts, decoding runs, and the acceptance rows they add up to."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from statistics import median
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from peagle.capture.chat import answer_text, prompt_ids
from peagle.capture.config import DTYPES
from peagle.capture.prompts import Prompt, PromptSource, load_prompts, refuse_equal_names
from peagle.decode.decoder import Decoded, Decoder
from peagle.model.checkpoint import check_address


@dataclass(frozen=True)
class EvaluationConfig:
    """What ``test`` decodes.

    Args:
        prompts: prompt sets; each gets its own rows.
        k: drafts per round to try.
        temperatures: 0 is greedy, and checks that output equals the target's own.
        max_new_tokens: length limit of an answer.
        batch_size: prompts decoded together; 1 is how latency is usually stated.
        dtype: precision of target and drafter. In float32 greedy output is token-identical; in
            bf16 the target itself rounds differently for different batch shapes.
        device: ``auto`` is a GPU if there is one.
        seed: of sampled decoding.
        template_options: for the chat template, as in ``capture``.
        baseline: checkpoint of another drafter for this target, such as an EAGLE-3 one, to be
            decoded on the same prompts and shown beside.
    """

    prompts: list[PromptSource] = field(
        default_factory=lambda: [PromptSource("stdlib", "test", limit=40)]
    )
    k: tuple[int, ...] = (3, 5, 7)
    temperatures: tuple[float, ...] = (0.0,)
    max_new_tokens: int = 256
    batch_size: int = 1
    dtype: str = "float32"
    device: str = "auto"
    seed: int = 0
    template_options: dict[str, Any] | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        refuse_equal_names(self.prompts)
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k must list numbers of drafts, each at least 1, got {self.k}")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures must not be negative, got {self.temperatures}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.baseline is not None:
            check_address(self.baseline)


class PromptBatch(NamedTuple):
    """Prompts of one set, decoded together."""

    prompt_set: str
    prompts: list[Prompt]


class Run(NamedTuple):
    """One batch decoded with one drafter and K (0: without drafter) at one temperature."""

    prompt_set: str
    method: str | None  # the drafter's
    k: int
    temperature: float
    decoded: Decoded
    turns: int  # answers that were given


def prompt_batches(config: EvaluationConfig) -> list[PromptBatch]:
    """Every prompt set, in batches."""
    batches = []
    for source in config.prompts:
        prompts = load_prompts(source)
        batches += [
            PromptBatch(source.name, prompts[start : start + config.batch_size])
            for start in range(0, len(prompts), config.batch_size)
        ]
    return batches


class Setting(NamedTuple):
    """One way to answer: without drafter, or with one of them and K."""

    method: str | None
    k: int
    temperature: float


OWN = Setting(None, 0, 0.0)  # what the target says by itself


class Turn(NamedTuple):
    """The answers to one user's turn, of those conversations of a batch that have so many."""

    members: list[int]
    decoded: Decoded


def decode_batch(
    decoders: Mapping[str, Decoder],
    batch: PromptBatch,
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Run]:
    """Without drafter and with every drafter and K, at every temperature, turn by turn.

    ``decoders`` have one target and a drafter each; their names are what rows call the method.
    Later turns are asked in the context of what the target says to the earlier ones greedily and
    by itself, so that every drafter and K answers the same prompts.
    """
    ways = ((None, 0), *product(decoders, config.k))
    settings = [Setting(*way, t) for t in config.temperatures for way in ways]
    found: dict[Setting, list[Turn]] = {setting: [] for setting in settings}
    talks = [prompt.opening() for prompt in batch.prompts]
    members, number = list(range(len(talks))), 0
    while members:
        ids = [
            prompt_ids(tokenizer, talks[i], batch.prompts[i].options(config.template_options))
            for i in members
        ]
        for setting in settings:
            found[setting].append(Turn(members, decode(decoders, ids, config, setting)))
        number += 1
        going_on = [i for i in members if len(batch.prompts[i].turns) > number]
        if going_on:
            own = found[OWN][-1].decoded if OWN in found else decode(decoders, ids, config, OWN)
            said = dict(zip(members, own.tokens, strict=True))
            for i in going_on:
                talks[i].append({"role": "assistant", "content": answer_text(tokenizer, said[i])})
                talks[i].append({"role": "user", "content": batch.prompts[i].turns[number]})
        members = going_on
    return [run_of(batch, setting, turns) for setting, turns in found.items()]


def decode(
    decoders: Mapping[str, Decoder],
    ids: list[list[int]],
    config: EvaluationConfig,
    setting: Setting,
) -> Decoded:
    decoder = decoders[setting.method or next(iter(decoders))]
    return decoder.decode(
        ids,
        k=setting.k,
        temperature=setting.temperature,
        max_new_tokens=config.max_new_tokens,
        generator=torch.Generator(decoder.target.device).manual_seed(config.seed),
    )


def run_of(batch: PromptBatch, setting: Setting, turns: list[Turn]) -> Run:
    """The turns of every conversation as one answer."""
    tokens: list[list[int]] = [[] for _ in batch.prompts]
    accepted: list[list[int]] = [[] for _ in batch.prompts]
    for members, decoded in turns:
        for row, i in enumerate(members):
            tokens[i] += decoded.tokens[row]
            accepted[i] += decoded.accepted[row]
    drafting = [turn.decoded.draft_seconds for turn in turns]
    # Of later turns without the first round, which reads the prompts.
    rounds = sum((seconds[1:] for seconds in drafting[1:]), drafting[0])
    seconds = sum(turn.decoded.seconds for turn in turns)
    answers = sum(len(turn.members) for turn in turns)
    together = Decoded(tokens, accepted, seconds, rounds)
    return Run(batch.prompt_set, *setting, together, answers)


def acceptance_rows(runs: list[Run], *, engine: str, dtype: str) -> list[dict[str, Any]]:
    """One row per prompt set, temperature, K and drafter (``acceptance.json``).

    Of several drafters the run's own comes first.
    """
    methods = list(dict.fromkeys(run.method for run in runs if run.method))
    keys = sorted(
        {(r.prompt_set, r.temperature, r.k, methods.index(r.method)) for r in runs if r.method}
    )
    rows = []
    for prompt_set, temperature, k, index in keys:
        method = methods[index]
        found = selected(runs, prompt_set, temperature, method, k)
        ours = [run.decoded for run in found]
        alone = [run.decoded for run in selected(runs, prompt_set, temperature, None, 0)]
        accepted = [per_prompt for decoded in ours for per_prompt in decoded.accepted]
        rows.append(
            {
                "prompt_set": prompt_set,
                "method": method,
                "k": k,
                "temperature": temperature,
                "engine": engine,
                "dtype": dtype,
                "prompts": len(accepted),
                "turns": sum(run.turns for run in found),
                "tokens": token_count(ours),
                "acceptance_length": acceptance_length(accepted),
                "acceptance_length_ci95": confidence_interval(accepted),
                "per_position": per_position(accepted, k),
                "accepted_by_prompt": [sum(per_prompt) for per_prompt in accepted],
                "rounds_by_prompt": [len(per_prompt) for per_prompt in accepted],
                "lossless_prompts": identical(ours, alone) if temperature == 0 else None,
                "tokens_per_second": speed(ours),
                "baseline_tokens_per_second": speed(alone),
                "draft_ms_per_round": draft_milliseconds(ours),
            }
        )
    return rows


def selected(
    runs: list[Run], prompt_set: str, temperature: float, method: str | None, k: int
) -> list[Run]:
    wanted = (prompt_set, method, k, temperature)
    return [r for r in runs if (r.prompt_set, r.method, r.k, r.temperature) == wanted]


def token_count(decoded: list[Decoded]) -> int:
    return sum(len(tokens) for d in decoded for tokens in d.tokens)


def speed(decoded: list[Decoded]) -> float:
    """Output tokens per second, prefill included."""
    return token_count(decoded) / sum(d.seconds for d in decoded)


def draft_milliseconds(decoded: list[Decoded]) -> float | None:
    """The drafter's latency in a round, median; first rounds, which read the prompts, apart.

    ``None`` where no answer was long enough for a second round.
    """
    later = [seconds for d in decoded for seconds in d.draft_seconds[1:]]
    return 1000 * median(later) if later else None


def identical(ours: list[Decoded], alone: list[Decoded]) -> int:
    """Prompts whose output with drafter equals the target's own, token for token."""
    pairs = zip(ours, alone, strict=True)
    return sum(a == b for d, e in pairs for a, b in zip(d.tokens, e.tokens, strict=True))


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
