"""What ``test`` decodes: every prompt set, with every drafter and K, at every temperature."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from peagle.capture.chat import answer_text, prompt_ids
from peagle.capture.config import Dtype, require_positive
from peagle.capture.prompts import Prompt, PromptSource, check_sources, load_prompts
from peagle.capture.rehearsal import rehearse
from peagle.decode.decoder import Decoded, Decoder
from peagle.model.checkpoint import check_address
from peagle.target.target import TargetSource


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
    dtype: Dtype = "float32"
    device: str = "auto"
    seed: int = 0
    template_options: dict[str, Any] | None = None
    baseline: str | None = None

    def __post_init__(self) -> None:
        check_sources(self.prompts, "evaluation")
        require_positive(self, "evaluation", ("max_new_tokens", "batch_size"))
        if not self.k or min(self.k) < 1:
            raise ValueError(f"k must list numbers of drafts, each at least 1, got {self.k}")
        if not self.temperatures or not all(0 <= t < math.inf for t in self.temperatures):
            raise ValueError(f"temperatures must not be negative, got {self.temperatures}")
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


def prompt_batches(
    config: EvaluationConfig, target: TargetSource, *, shown: bool = True
) -> list[PromptBatch]:
    """Every prompt set, in batches; the target's tokenizer renders each prompt once.

    Its progress is ``shown`` by one process.

    Raises:
        ValueError: for a set that cannot be read, or a prompt that cannot be asked.
    """
    text, tokenizer, batches = target.config(), target.tokenizer(), []
    for source in config.prompts:
        options = config.template_options
        prompts = rehearse(load_prompts(source), tokenizer, text, options, shown=shown).prompts
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


GREEDY_TARGET = Setting(None, 0, 0.0)  # what the target says by itself


def decode_batch(
    decoders: Mapping[str, Decoder],
    batch: PromptBatch,
    config: EvaluationConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Run]:
    """Decode a batch in every setting, turn by turn.

    ``decoders`` have one target and a drafter each; their names are what rows call the method.
    The history of a later turn is what the target says greedily and by itself, so that every
    drafter and K answers the same prompts.
    """
    methods = ((None, 0), *product(decoders, config.k))
    settings = [Setting(*method, t) for t in config.temperatures for method in methods]
    runs = {setting: empty_run(batch, setting) for setting in settings}
    history: list[list[list[int]]] = [[] for _ in batch.prompts]
    members = list(range(len(batch.prompts)))  # conversations that have so many turns
    while members:
        ids = [
            turn_prompt(tokenizer, batch.prompts[i], history[i], config.template_options)
            for i in members
        ]
        answers = {setting: decode(decoders, ids, config, setting) for setting in settings}
        runs = {setting: add_turn(runs[setting], members, answers[setting]) for setting in runs}
        remaining = [i for i in members if len(batch.prompts[i].turns) > len(history[i]) + 1]
        if remaining:
            own = answers.get(GREEDY_TARGET) or decode(decoders, ids, config, GREEDY_TARGET)
            for i, tokens in zip(members, own.tokens, strict=True):
                history[i].append(tokens)
        members = remaining
    return list(runs.values())


def turn_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    history: list[list[int]],
    template_options: dict[str, Any] | None,
) -> list[int]:
    """The user's next turn after the answers so far, as the chat template renders it."""
    messages = prompt.opening()
    for answer, question in zip(history, prompt.turns[1:], strict=False):
        messages.append({"role": "assistant", "content": answer_text(tokenizer, answer)})
        messages.append({"role": "user", "content": question})
    return prompt_ids(tokenizer, messages, prompt.options(template_options), prompt.place)


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


def empty_run(batch: PromptBatch, setting: Setting) -> Run:
    decoded = Decoded([[] for _ in batch.prompts], [[] for _ in batch.prompts], 0.0, [])
    return Run(batch.prompt_set, *setting, decoded, 0)


def add_turn(run: Run, members: list[int], turn: Decoded) -> Run:
    """The run with the answers to one more turn of the given prompts."""
    tokens, accepted, seconds, draft_seconds = run.decoded
    for row, i in enumerate(members):
        tokens[i] += turn.tokens[row]
        accepted[i] += turn.accepted[row]
    # Of later turns without the first round, which reads the prompts.
    draft_seconds = draft_seconds + turn.draft_seconds[1 if run.turns else 0 :]
    together = Decoded(tokens, accepted, seconds + turn.seconds, draft_seconds)
    return run._replace(decoded=together, turns=run.turns + len(members))
