"""Conversations as token ids, with the assistant's tokens marked.

The mark comes from the template's own rendering: its ``{% generation %}`` mask where it has one,
else the difference between the rendering before and after each assistant turn.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Message = dict[str, str]


class Rendered(NamedTuple):
    input_ids: Int[Tensor, " n"]
    loss_mask: Bool[Tensor, " n"]


def conversation_id(messages: Sequence[Message]) -> str:
    """Hash of a conversation's text; decides its split and names it in messages."""
    text = json.dumps([[m["role"], m["content"]] for m in messages], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> list[int]:
    """The conversation so far, ending where the assistant's next token comes."""
    text = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, finished: bool = True
) -> Rendered:
    """Ids and assistant mask of a whole conversation.

    ``finished`` is false when the last answer was cut off: its end-of-turn token, which the
    target never wrote, is then left out.

    Raises:
        ValueError: naming the sample, if no token or every token is the assistant's, or if the
            template rewrites earlier turns so that the assistant's text cannot be found.
    """
    name = f"sample {conversation_id(messages)}"
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template")
    template = tokenizer.chat_template
    if "{% generation" in template or "{%- generation" in template:
        ids, mask = by_generation_mask(tokenizer, messages)
    else:
        ids, mask = by_prefix(tokenizer, messages, name)
    if not finished:
        end = last_true(mask) + 1
        while end and ids[end - 1] == tokenizer.eos_token_id:
            end -= 1
        ids, mask = ids[:end], mask[:end]
    if not mask.any() or mask.all():
        kind = "no" if not mask.any() else "nothing but"
        raise ValueError(f"{name} has {kind} supervised tokens: check the chat template")
    return Rendered(ids, mask)


def by_generation_mask(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]
) -> tuple[Tensor, Tensor]:
    out = tokenizer.apply_chat_template(
        list(messages), return_assistant_tokens_mask=True, return_dict=True
    )
    return torch.tensor(out["input_ids"]), torch.tensor(out["assistant_masks"]).bool()


def by_prefix(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], name: str
) -> tuple[Tensor, Tensor]:
    """Mark what each assistant turn adds to the rendering of the turns before it."""
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    spans = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(
                list(messages[:i]), add_generation_prompt=True, tokenize=False
            )
            after = tokenizer.apply_chat_template(list(messages[: i + 1]), tokenize=False)
            if not (text.startswith(before) and text.startswith(after)):
                raise ValueError(f"{name}: the chat template rewrites earlier turns")
            spans.append((len(before), len(after)))
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = torch.tensor(encoded["input_ids"])
    start, stop = torch.tensor(encoded["offset_mapping"]).unbind(-1)
    mask = torch.zeros(len(ids), dtype=torch.bool)
    for begin, end in spans:
        inside = (start >= begin) & (stop <= end) & (stop > start)
        ended = torch.cumsum(inside & (ids == tokenizer.eos_token_id), 0)
        # Up to and with the first end-of-turn token: what follows is the template's.
        mask |= inside & ((ended == 0) | ((ended == 1) & (ids == tokenizer.eos_token_id)))
    return ids, mask


def last_true(mask: Bool[Tensor, " n"]) -> int:
    found = torch.nonzero(mask).flatten()
    return int(found[-1]) if len(found) else -1
