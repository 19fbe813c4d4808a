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
from transformers.utils.chat_template_utils import render_jinja_template

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

    What the assistant wrote is tokenized apart from what comes before, because that is how it is
    generated: a tokenizer may merge the last character of a prompt with the first of an answer,
    a target never does.

    ``finished`` is false when the last answer was cut off: its end-of-turn token, which the
    target never wrote, is then left out.

    Raises:
        ValueError: naming the sample, if no token or every token is the assistant's, or if the
            template rewrites earlier turns so that the assistant's text cannot be found.
    """
    name = f"sample {conversation_id(messages)}"
    if not tokenizer.chat_template:
        raise ValueError(f"the tokenizer of {tokenizer.name_or_path} has no chat template")
    text, spans = assistant_spans(tokenizer, messages, name)
    ids: list[int] = []
    mask: list[bool] = []
    done = 0
    for begin, end in spans:
        before = tokenizer(text[done:begin], add_special_tokens=False)["input_ids"]
        said = tokenizer(text[begin:end], add_special_tokens=False)["input_ids"]
        # Up to and with the first end-of-turn token: what follows is the template's.
        ends = [i for i, token in enumerate(said) if token == tokenizer.eos_token_id]
        own = ends[0] + 1 if ends else len(said)
        ids += before + said
        mask += [False] * len(before) + [True] * own + [False] * (len(said) - own)
        done = end
    if finished:
        after = tokenizer(text[done:], add_special_tokens=False)["input_ids"]
        ids, mask = ids + after, mask + [False] * len(after)
    else:
        stop = len(mask) - mask[::-1].index(True) if any(mask) else 0
        stop -= stop > 0 and ids[stop - 1] == tokenizer.eos_token_id
        ids, mask = ids[:stop], mask[:stop]
    if not any(mask) or all(mask):
        kind = "no" if not any(mask) else "nothing but"
        raise ValueError(f"{name} has {kind} supervised tokens: check the chat template")
    return Rendered(torch.tensor(ids), torch.tensor(mask))


def assistant_spans(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], name: str
) -> tuple[str, list[tuple[int, int]]]:
    """The rendered conversation, and where the assistant's words lie in it."""
    template = tokenizer.chat_template
    if "{% generation" in template or "{%- generation" in template:
        texts, spans = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        return texts[0], [(begin, end) for begin, end in spans[0] if begin < end]
    text = tokenizer.apply_chat_template(list(messages), tokenize=False)
    found = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(
                list(messages[:i]), add_generation_prompt=True, tokenize=False
            )
            after = tokenizer.apply_chat_template(list(messages[: i + 1]), tokenize=False)
            if not (text.startswith(before) and text.startswith(after)):
                raise ValueError(f"{name}: the chat template rewrites earlier turns")
            found.append((len(before), len(after)))
    return text, found
