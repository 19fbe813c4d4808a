"""How much data a run will have: conversations, tokens, bytes on the disk.

A store that is there is counted. Otherwise prompts are tokenized and a sample of them is answered
by the target, if its weights are on this machine; if not, every answer counts as long as it may
become, and the figures are upper bounds.
"""

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from peagle.capture.answers import answers_in_data, drop_too_long, require_room
from peagle.capture.chat import documents, prompt_ids
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Answer
from peagle.capture.extract import sample_bytes_per_token
from peagle.capture.generate import answer_batch
from peagle.capture.import_speculators import load_rows
from peagle.capture.prompts import Prompt, load_prompts
from peagle.capture.work_split import make_batches, unique_prompts
from peagle.kernels.device import pick_device
from peagle.store.errors import reason
from peagle.store.hub import FoundStore
from peagle.store.manifest import Manifest
from peagle.store.reader import Store
from peagle.target.layers import default_start_layers
from peagle.target.target import TargetSource

SAMPLE_SEED = 0


class Lengths(NamedTuple):
    """Means over a sample of conversations, in tokens."""

    after_prompt: float  # what follows the first prompt: answers, further turns
    supervised: float  # of all
    seconds: float  # the target took to answer one conversation; 0 if none was answered
    ids: frozenset[int]  # the tokens that occurred


class Size(NamedTuple):
    """Of one conversation."""

    tokens: float
    supervised: float


@dataclass(frozen=True)
class Forecast:
    """What a store holds or will hold."""

    conversations: int
    tokens: int
    supervised: int
    bytes: int
    basis: str  # where the figures come from, in words
    answer_seconds: float = 0.0  # transformers needs to answer all prompts; 0 if not measured
    ids: frozenset[int] = frozenset()  # tokens that occur
    unread: tuple[str, ...] = ()  # prompt sets that could not be read here
    trained: tuple[Size, ...] = ()  # the conversations that are not kept for validation
    exact: bool = True  # their sizes are counted; else estimated, and the long ones not known


def forecast(
    target: TargetSource,
    config: CaptureConfig,
    manifest: Manifest,
    place: Path | FoundStore,
    *,
    answers: int,
) -> Forecast:
    """The data of a run; ``answers`` prompts are answered to learn how long answers are."""
    if isinstance(place, FoundStore):
        size = sum(file.size for file in place.files.values())
        return counted(Store(place.folder, allow_missing=True), size)
    if (place / "manifest.json").exists():
        size = sum(path.stat().st_size for path in place.iterdir() if path.is_file())
        return counted(Store(place), size)
    if config.speculators is not None:
        return to_convert(target, config, manifest)
    prompts, unknown, unread = readable(config)
    text, tokenizer = target.config(), tokenizer_of(target)
    if tokenizer is None or not prompts:
        prompts, unknown = [], unknown + len(prompts)
    openings = [
        prompt_ids(
            tokenizer, prompt.opening(), prompt.options(config.template_options), prompt.place
        )
        for prompt in prompts
    ]
    fits = [i for i, ids in enumerate(openings) if len(ids) < config.max_tokens - 1]
    lengths, basis = measured(target, tokenizer, [prompts[i] for i in fits], config, answers)
    sizes = [
        Size(min(len(openings[i]) + lengths.after_prompt, config.max_tokens), lengths.supervised)
        for i in fits
    ]
    sizes += [Size(config.max_tokens, min(config.max_new_tokens, config.max_tokens))] * unknown
    if unknown:
        basis += (
            f"; {unknown} conversations that cannot be read here count {config.max_tokens} each"
        )
    return replace(
        to_capture(sizes, text, config, manifest, basis),
        answer_seconds=len(fits) * lengths.seconds,
        ids=lengths.ids | {token for ids in openings for token in ids},
        unread=tuple(unread),
        exact=False,
    )


def to_capture(
    sizes: list[Size],
    text: PretrainedConfig,
    config: CaptureConfig,
    manifest: Manifest,
    basis: str,
) -> Forecast:
    """The store that conversations of these sizes will make."""
    tokens = round(sum(size.tokens for size in sizes))
    return Forecast(
        conversations=len(sizes),
        tokens=tokens,
        supervised=round(sum(size.supervised for size in sizes)),
        bytes=tokens * sample_bytes_per_token(manifest) + target_bytes(text, config),
        basis=basis,
        # Which are kept for validation is drawn by hash: any will do.
        trained=tuple(sizes[: round(len(sizes) * (1 - config.val_share))]),
    )


def counted(store: Store, size: int) -> Forecast:
    """What a finished store holds; ``size`` is that of its files."""
    return Forecast(
        conversations=len(store),
        tokens=sum(entry.tokens for entry in store.entries),
        supervised=sum(entry.supervised for entry in store.entries),
        bytes=size,
        basis="counted in the finished store",
        trained=tuple(
            Size(store.entries[i].tokens, store.entries[i].supervised) for i in store.split("train")
        ),
    )


def to_convert(target: TargetSource, config: CaptureConfig, manifest: Manifest) -> Forecast:
    """What speculators' data set holds."""
    rows = load_rows(config.speculators_folder)
    sizes = [Size(len(row["input_ids"]), int(row["loss_mask"].sum())) for row in rows]
    basis = f"counted in {config.speculators}"
    ids = frozenset(token for row in rows for token in row["input_ids"].tolist())
    return replace(to_capture(sizes, target.config(), config, manifest, basis), ids=ids)


def readable(config: CaptureConfig) -> tuple[list[Prompt], int, list[str]]:
    """The prompts that can be read, how many more there will be, and what could not be read."""
    prompts: list[Prompt] = []
    unknown, unread = 0, []
    for source in config.prompts:
        try:
            prompts += load_prompts(source)
        except ValueError as error:
            if not source.on_hub:
                raise
            unread.append(f"{source.source}: {reason(error)}")
            unknown += source.limit or 0
    return unique_prompts(prompts, config), unknown, unread


def tokenizer_of(target: TargetSource) -> PreTrainedTokenizerBase | None:
    """None when only the target's configuration is at hand."""
    try:
        return target.tokenizer()
    except ValueError:
        return None


def measured(
    target: TargetSource,
    tokenizer: PreTrainedTokenizerBase | None,
    prompts: list[Prompt],
    config: CaptureConfig,
    answers: int,
) -> tuple[Lengths, str]:
    """How long conversations become, and how that is known."""
    weights = Path(target.path).is_dir() and any(Path(target.path).glob("*.safetensors"))
    if prompts and not config.regenerate:
        given = answers_in_data(tokenizer, prompts, config, target.end_tokens())
        answered = drop_too_long(given, config)
        require_room(answered, config.max_tokens)
        return lengths_of(list(answered.values())), "all read"
    if not prompts or not weights or not answers:
        most = min(config.max_new_tokens, config.max_tokens)
        return Lengths(most, most, 0.0, frozenset()), "upper bound: every answer as long as allowed"
    chosen = evenly(prompts, answers)
    model = target.model(dtype=getattr(torch, config.dtype), device=pick_device(config.device))
    begin, answered = time.perf_counter(), []
    for batch in make_batches(chosen, config):
        answered += answer_batch(model, tokenizer, batch, config)
    seconds = (time.perf_counter() - begin) / len(chosen)
    lengths = lengths_of(answered)._replace(seconds=seconds)
    return lengths, f"answers measured on {len(chosen)} prompts"


def evenly(prompts: list[Prompt], count: int) -> list[Prompt]:
    """A sample of the prompts, the same one each time."""
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    chosen = torch.randperm(len(prompts), generator=generator)[:count].tolist()
    return [prompts[i] for i in chosen]


def lengths_of(answers: list[Answer]) -> Lengths:
    rendered = [document for answer in answers for document in documents(answer.turns)]
    ids = [token for document in rendered for token in document.input_ids.tolist()]
    after_prompt = len(ids) - sum(len(answer.turns[0].prompt) for answer in answers)
    supervised = sum(int(document.loss_mask.sum()) for document in rendered)
    return Lengths(after_prompt / len(answers), supervised / len(answers), 0.0, frozenset(ids))


def target_bytes(text: PretrainedConfig, config: CaptureConfig) -> int:
    """The target's embedding and head in bf16, and the layers that a drafter may start from."""
    weights = 2 * text.vocab_size * text.hidden_size
    if text.model_type == "llama":  # other layers are not copied
        heads = 2 * (text.num_attention_heads + text.num_key_value_heads) * text.head_dim
        start = config.start_layers or default_start_layers(text.num_hidden_layers)
        weights += len(start) * text.hidden_size * (heads + 3 * text.intermediate_size + 2)
    return 2 * weights
