"""Chat templates: a conversation's messages as token ids, with the assistant's tokens marked.

A conversation is a list of turns: what the target is given and what it answers. Both are token
ids, so nothing that a template does to *earlier* turns (Qwen3 and GPT-OSS leave out their
reasoning) can put words into an answer that the target would not say there.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from peagle.capture.messages import Message

Options = Mapping[str, Any]  # what a template is given besides the messages: tools, say

# Where reasoning begins and ends: Qwen3 and many others, GPT-OSS' harmony, Gemma 4.
REASONING = (
    ("<think>", "</think>"),
    ("<|channel|>analysis", "<|end|>"),
    ("<|channel>", "<channel|>"),
)
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # where messages hold it, by template


class Turn(NamedTuple):
    prompt: list[int]  # all that comes before the answer, as the template renders it then
    answer: list[int]  # with its end token, unless it was cut off


class Document(NamedTuple):
    """What becomes one sample of a store."""

    input_ids: Int[Tensor, " n"]
    loss_mask: Bool[Tensor, " n"]  # tokens of the assistant


def conversation_id(messages: Sequence[Message]) -> str:
    """Hash of a conversation's text, which names its sample."""
    text = json.dumps([[m["role"], m.get("content")] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    options: Options | None,
    *,
    add_generation_prompt: bool,
    place: str = "a prompt",
) -> str:
    """The template's text.

    Raises:
        ValueError: for a missing template, or one that refuses; with the ``place`` of the messages.
    """
    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer of {tokenizer.name_or_path} has no chat template: put the model's "
            "chat_template.jinja beside its tokenizer.json, or take a target that was trained to "
            "chat"
        )
    fixed = {"add_generation_prompt": add_generation_prompt, "tokenize": False}
    try:
        return tokenizer.apply_chat_template(list(messages), **fixed, **(options or {}))
    except Exception as error:  # templates raise what they like, in words of their own
        raise ValueError(f"{place}: the chat template refuses it ({error})") from error


def prompt_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    options: Options | None = None,
    place: str = "a prompt",
) -> list[int]:
    """The conversation so far, ending where the assistant's next token comes."""
    text = render(tokenizer, messages, options, add_generation_prompt=True, place=place)
    return tokenizer.encode(text, add_special_tokens=False)


def turns_from_messages(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    ends: set[int],
    options: Options | None = None,
    place: str = "a prompt",
) -> list[Turn]:
    """The turns of a conversation whose answers are given as text.

    An answer is tokenized apart from what comes before it, because that is how it is generated: a
    tokenizer may merge the last character of a prompt with the first of an answer, a target never
    does. It ends with the first of the tokens ``ends``; what follows is the template's.

    Raises:
        ValueError: naming the ``place``, if the template drops a message, a call or
            the reasoning, or rewrites an answer, or if an answer is empty.
    """
    turns = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = render(tokenizer, messages[:i], options, add_generation_prompt=True, place=place)
        after = render(
            tokenizer, messages[: i + 1], options, add_generation_prompt=False, place=place
        )
        text = after[len(before) :]
        refuse_unsaid(messages[:i], options, before, place)
        lost = unsaid(message, text, own_turn=True)
        if lost or not after.startswith(before):
            what = f"the assistant's {lost or 'words'}"
            raise ValueError(f"{place}: the chat template drops or rewrites turns ({what})")
        prompt, answer = (tokenizer.encode(t, add_special_tokens=False) for t in (before, text))
        stop = next((n + 1 for n, token in enumerate(answer) if token in ends), len(answer))
        turns.append(Turn(prompt, answer[:stop]))
    if not turns or not all(turn.answer for turn in turns):
        raise ValueError(f"{place} has no supervised tokens: check the chat template")
    return turns


def refuse_unsaid(
    messages: Sequence[Message], options: Options | None, text: str, place: str
) -> None:
    """Raise ``ValueError`` unless a rendering says the messages, and offers the tools."""
    for message in messages:
        if lost := unsaid(message, text):
            what = f"the {message['role']}'s {lost}"
            raise ValueError(f"{place}: the chat template drops or rewrites turns ({what})")
    for tool in (options or {}).get("tools") or ():
        if tool["function"]["name"] not in text:
            raise ValueError(f"{place}: the chat template does not offer the row's tools")


def unsaid(message: Message, text: str, *, own_turn: bool = False) -> str | None:
    """What of a message a rendering leaves out; templates may strip it.

    They may leave reasoning out of the history, but not out of the turn that it belongs to.
    """
    pieces = [message.get("content") or ""]
    if message["role"] == "assistant":
        pieces = re.split("|".join(REASONING[0]), pieces[0])
    if any(piece.strip() not in text for piece in (pieces if own_turn else pieces[-1:])):
        return "words"
    if not all(is_called(call["function"], text) for call in message.get("tool_calls") or ()):
        return "tool calls"
    thoughts = [str(message[key]) for key in THOUGHTS if own_turn and message.get(key)]
    return "reasoning" if any(thought.strip() not in text for thought in thoughts) else None


def is_called(function: Mapping[str, Any], text: str) -> bool:
    """Whether a rendering has a call's name and every argument, however it writes those."""
    return all(
        any(form in text for form in written_forms(value))
        for value in (function["name"], *leaves(function.get("arguments")))
    )


def leaves(value: Any) -> Iterator[Any]:
    """What an object of JSON is made of: names, texts, numbers."""
    if isinstance(value, Mapping):
        yield from value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from leaves(item)
    elif value is not None:
        yield value


def written_forms(value: Any) -> set[str]:
    if not isinstance(value, str):
        return {json.dumps(value), str(value)}
    quoted = (json.dumps(value), json.dumps(value, ensure_ascii=False), repr(value))
    return {value.strip(), *(text[1:-1] for text in quoted)}


def documents(turns: Sequence[Turn]) -> list[Document]:
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
    return [Document(torch.tensor(ids), torch.tensor(mask)) for ids, mask in found]


def mask_reasoning(document: Document, tokenizer: Tokenizer) -> Document:
    """The same document with the assistant's reasoning left out of the loss."""
    ids, mask = document.input_ids.tolist(), document.loss_mask.clone()
    for marks in REASONING:
        begin, end = (tokenizer.encode(mark, add_special_tokens=False) for mark in marks)
        start = find_sequence(ids, begin, 0)
        while start is not None:
            stop = find_sequence(ids, end, start + len(begin))
            stop = len(ids) if stop is None else stop + len(end)
            mask[start:stop] = False
            start = find_sequence(ids, begin, stop)
    return document._replace(loss_mask=mask)


def find_sequence(ids: list[int], wanted: list[int], start: int) -> int | None:
    """Where ``wanted`` begins in ``ids``, at ``start`` or later."""
    width = len(wanted)
    places = range(start, len(ids) - width + 1)
    return next((i for i in places if ids[i : i + width] == wanted), None)


def answer_text(tokenizer: Tokenizer, answer: list[int]) -> str:
    """What an answer says, as the history of the next turn holds it: without reasoning."""
    raw = text = tokenizer.decode(answer, skip_special_tokens=False)
    for begin, end in REASONING:
        text = re.sub(f"{re.escape(begin)}.*?({re.escape(end)}|$)", "", text, flags=re.DOTALL)
    text = text.rpartition("<|message|>")[2]  # harmony: the last channel is the final one
    if text == raw:
        return tokenizer.decode(answer, skip_special_tokens=True)
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text.lstrip("\n")
