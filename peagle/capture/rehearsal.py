"""Renders every prompt by the tokenizer alone, before answers are asked or weights are loaded."""

import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from transformers import PretrainedConfig
from transformers import PreTrainedTokenizerBase as Tokenizer

from peagle.capture.answers import require_room
from peagle.capture.chat import refuse_unsaid, render, turns_from_messages
from peagle.capture.prompts import Prompt, refuse_late_system
from peagle.progress import track

STAND_IN = "."  # for an answer that is not there yet


class Rehearsed(NamedTuple):
    """The prompts that leave room, and the tokens of each: of its longest rendered sequence."""

    prompts: list[Prompt]
    tokens: list[int]


def rehearse(
    prompts: Sequence[Prompt],
    tokenizer: Tokenizer,
    text: PretrainedConfig,
    template_options: dict[str, Any] | None,
    *,
    mask_token_id: int | None = None,
    max_tokens: int | None = None,
    answers_in_data: bool = False,
    shown: bool = True,
) -> Rehearsed:
    """The prompts that leave room within the target's positions; says how many do not.

    What is ``shown`` besides errors would be the same in every process.

    Raises:
        ValueError: for an option that the template does not know; with the place of the first
            prompt that the template refuses or does not say whole, or that holds the mask token or
            an id beyond the target's vocabulary; or if no prompt leaves room there, or within
            ``max_tokens``.
    """
    refuse_unknown_options(tokenizer, template_options)
    positions = getattr(text, "max_position_embeddings", None) or math.inf
    fit, shortest = Rehearsed([], []), math.inf
    for prompt in track("prompts", prompts, shown=shown):
        found = list(sequences(tokenizer, prompt, template_options, answers_in_data))
        for ids in found:
            refuse_ids(ids, tokenizer, prompt, text.vocab_size, mask_token_id)
        shortest = min(shortest, len(found[0]) + (0 if answers_in_data else 2))
        if len(found[0]) < positions:
            fit.prompts.append(prompt)
            fit.tokens.append(max(map(len, found)))
    if prompts and max_tokens is not None:
        require_room(shortest <= max_tokens, max_tokens)
    if len(fit.prompts) < len(prompts):
        count = f"{len(prompts) - len(fit.prompts)} of {len(prompts)} prompts"
        problem = f"longer than the target's {positions} positions"
        if not fit.prompts:
            raise ValueError(f"{count} are {problem}: give shorter ones")
        if shown:
            print(f"{count} are {problem} and were left out")
    return fit


def refuse_unknown_options(tokenizer: Tokenizer, template_options: dict[str, Any] | None) -> None:
    """Raise ``ValueError`` for an option that the chat template does not name, and so ignores."""
    template = str(tokenizer.chat_template or "")
    for name in template_options or ():
        if template and not re.search(rf"\b{re.escape(name)}\b", template):
            raise ValueError(
                f"the chat template of {tokenizer.name_or_path} does not know {name!r}: correct or "
                "leave out template_options"
            )


def sequences(
    tokenizer: Tokenizer,
    prompt: Prompt,
    template_options: dict[str, Any] | None,
    answers_in_data: bool,
) -> Iterator[list[int]]:
    """What of a prompt is known without the target, as tokens."""
    rendered = said_in_data if answers_in_data else asked
    return rendered(tokenizer, prompt, prompt.options(template_options))


def asked(tokenizer: Tokenizer, prompt: Prompt, options: dict[str, Any]) -> Iterator[list[int]]:
    """The first prompt, and that of the last turn with answers made up."""
    refuse_late_system(prompt.messages, prompt.place)
    messages = prompt.opening()
    for number, turn in enumerate(prompt.turns):
        if number:
            messages += [
                {"role": "assistant", "content": STAND_IN},
                {"role": "user", "content": turn},
            ]
        if number in (0, len(prompt.turns) - 1):
            written = render(
                tokenizer, messages, options, add_generation_prompt=True, place=prompt.place
            )
            refuse_unsaid(messages, options, written, prompt.place)
            yield tokenizer.encode(written, add_special_tokens=False)


def said_in_data(
    tokenizer: Tokenizer, prompt: Prompt, options: dict[str, Any]
) -> Iterator[list[int]]:
    """Prompt and answer of every turn that the data hold."""
    for turn in turns_from_messages(
        tokenizer, prompt.answered(), ends=set(), options=options, place=prompt.place
    ):
        yield turn.prompt + turn.answer


def refuse_ids(
    ids: list[int],
    tokenizer: Tokenizer,
    prompt: Prompt,
    vocab_size: int,
    mask_token_id: int | None,
) -> None:
    """Raise ``ValueError`` for ids that the target does not have, and for the mask token."""
    if mask_token_id is not None and mask_token_id in ids:
        written = tokenizer.convert_ids_to_tokens(mask_token_id)
        raise ValueError(
            f"{prompt.place} holds the mask token {written!r} (id {mask_token_id}): take it out, "
            "or set model.mask_token_id to an id that never occurs"
        )
    if max(ids, default=0) >= vocab_size:
        raise ValueError(
            f"{prompt.place} has the token id {max(ids)}, beyond the target's vocabulary of "
            f"{vocab_size}: its tokenizer is another model's"
        )
