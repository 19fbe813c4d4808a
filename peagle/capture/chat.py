"""Conversations as token ids, with the assistant's tokens marked.

A conversation is a list of turns: what the target is given and what it answers. Both are token
ids, so nothing that a template does to *earlier* turns (Qwen3 and GPT-OSS leave out their
reasoning) can put words into an answer that the target would not say there.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Message = dict[str, Any]
Options = Mapping[str, Any]  # what a template is given besides the messages: tools, say

# Where reasoning begins and ends: Qwen3 and many others, GPT-OSS' harmony, Gemma 4.
REASONING = (
    ("<think>", "</think>"),
    ("<|channel|>analysis", "<|end|>"),
    ("<|channel>", "<channel|>"),
)


class Turn(NamedTuple):
    prompt: list[int]  # all that comes before the answer, as the template renders it then
    answer: list[int]  # with its end token, unless it was cut off


class Rendered(NamedTuple):
    input_ids: Int[Tensor, " n"]
    loss_mask: Bool[Tensor, " n"]


def conversation_id(messages: Sequence[Message]) -> str:
    """Hash of a conversation's text; decides its split and names it in messages."""
    text = json.dumps([[m["role"], m.get("content")] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rendering(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None,
    *,
    to_be_answered: bool,
) -> str:
    """The template's text. Raises ``ValueError`` for a missing template, or one that refuses."""
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template")
    try:
        return tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=to_be_answered, tokenize=False, **(options or {})
        )
    except Exception as error:  # templates raise what they like, in words of their own
        raise ValueError(
            f"sample {conversation_id(messages)}: the chat template refuses it ({error})"
        ) from error


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    options: Options | None = None,
) -> list[int]:
    """The conversation so far, ending where the assistant's next token comes."""
    text = rendering(tokenizer, messages, options, to_be_answered=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def turns_of(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    ends: set[int],
    options: Options | None = None,
    finished: bool = True,
) -> list[Turn]:
    """The turns of a conversation whose answers are given as text.

    An answer is tokenized apart from what comes before it, because that is how it is generated: a
    tokenizer may merge the last character of a prompt with the first of an answer, a target never
    does. It ends with the first of the tokens ``ends``; what follows is the template's.

    ``finished`` is false when the last answer was cut off: its end token, which the target never
    wrote, is then left out.

    Raises:
        ValueError: naming the sample, if the template drops a message or rewrites an answer, or
            if an answer is empty.
    """
    name, turns = f"sample {conversation_id(messages)}", []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = rendering(tokenizer, messages[:i], options, to_be_answered=True)
        after = rendering(tokenizer, messages[: i + 1], options, to_be_answered=False)
        lost = [m["role"] for m in messages[:i] if not kept(m, before)]
        if not after.startswith(before) or not kept(message, after[len(before) :]):
            lost.append("assistant")
        if lost:
            what = f"the {lost[0]}'s words"
            raise ValueError(f"{name}: the chat template drops or rewrites turns ({what})")
        said = tokenizer(after[len(before) :], add_special_tokens=False)["input_ids"]
        stop = next((n + 1 for n, token in enumerate(said) if token in ends), len(said))
        prompt = tokenizer(before, add_special_tokens=False)["input_ids"]
        turns.append(Turn(prompt, said[:stop]))
    if turns and not finished and turns[-1].answer and turns[-1].answer[-1] in ends:
        turns[-1] = turns[-1]._replace(answer=turns[-1].answer[:-1])
    if not turns or not all(turn.answer for turn in turns):
        raise ValueError(f"{name} has no supervised tokens: check the chat template")
    return turns


def kept(message: Message, text: str) -> bool:
    """Whether a message is in a rendering; templates may strip, and drop earlier reasoning."""
    content = message.get("content") or ""
    if message["role"] == "assistant":
        content = content.rpartition(REASONING[0][1])[2]
    return content.strip() in text


def documents(turns: Sequence[Turn]) -> list[Rendered]:
    """As few documents as hold every answer in the context in which it was given.

    One document, as long as each prompt goes on from the turn before. Where a template changed
    the history instead, the next answer starts a document of its own.
    """
    found: list[tuple[list[int], list[bool]]] = []
    for turn in turns:
        ids, mask = found[-1] if found else ([], [])
        if not found or turn.prompt[: len(ids)] != ids:
            ids, mask = [], []
            found.append((ids, mask))
        mask += [False] * (len(turn.prompt) - len(ids)) + [True] * len(turn.answer)
        ids += turn.prompt[len(ids) :] + turn.answer
    return [Rendered(torch.tensor(ids), torch.tensor(mask)) for ids, mask in found]


def fitting(turns: Sequence[Turn], max_tokens: int) -> list[Turn]:
    """The first turns, as many as fit whole."""
    lengths = [len(turn.prompt) + len(turn.answer) for turn in turns]
    count = next((i for i, n in enumerate(lengths) if n > max_tokens), len(turns))
    return list(turns[:count])


def without_reasoning(rendered: Rendered, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """The same document with the assistant's reasoning left out of the loss."""
    ids, mask = rendered.input_ids.tolist(), rendered.loss_mask.clone()
    for marks in REASONING:
        begin, end = (tokenizer(mark, add_special_tokens=False)["input_ids"] for mark in marks)
        start = position(ids, begin, 0)
        while start is not None:
            stop = position(ids, end, start + len(begin))
            stop = len(ids) if stop is None else stop + len(end)
            mask[start:stop] = False
            start = position(ids, begin, stop)
    return rendered._replace(loss_mask=mask)


def position(ids: list[int], part: list[int], start: int) -> int | None:
    """Where ``part`` begins in ``ids``, at ``start`` or later."""
    width = len(part)
    places = range(start, len(ids) - width + 1)
    return next((i for i in places if ids[i : i + width] == part), None)
