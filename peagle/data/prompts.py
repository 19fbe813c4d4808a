"""Where prompts come from: the built-in set, a JSONL file, or a data set on the Hub.

Only the user's side is used, unless a run asks for the answers in the data: answers should be the
target's own (paper section 4.1), since a drafter that learns somebody else's text guesses tokens
its target would not write.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

BUILT_IN = "stdlib"
COLUMNS = ("messages", "conversations", "turns", "prompt", "question", "instruction")
ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
}  # ShareGPT's names


class Prompt(NamedTuple):
    """The turns of one conversation that the target answers, one by one."""

    id: str
    system: str | None
    turns: tuple[str, ...]
    tools: tuple[dict[str, Any], ...] = ()  # that the target may call, in OpenAI's form
    messages: tuple[dict[str, Any], ...] = ()  # the whole conversation, where the data hold one

    def opening(self) -> list[dict[str, str]]:
        """The messages up to the target's first answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.turns[0]}]


@dataclass(frozen=True)
class PromptSource:
    """A prompt set.

    Args:
        source: ``stdlib`` (built in), the path of a ``.jsonl`` file, or a Hub data set id.
        split: ``train`` or ``test`` of the built-in set; any split name of a Hub data set.
        subset: which configuration of a Hub data set, where it has several (GSM8K's ``main``).
        column: where the prompt is; found by itself when it is one of the usual names.
        limit: use only the first so many.
    """

    source: str
    split: str = "train"
    column: str | None = None
    limit: int | None = None
    subset: str | None = None

    @property
    def name(self) -> str:
        """Short name for tables: ``humaneval`` for ``data/humaneval.jsonl``."""
        if self.source == BUILT_IN:
            return f"{BUILT_IN}-{self.split}"
        return Path(self.source).stem if self.source.endswith(".jsonl") else self.source


def load_prompts(source: PromptSource) -> list[Prompt]:
    """Read a prompt set, in its own order.

    Raises:
        ValueError: if the set is missing, empty, or has no column with prompts.
    """
    rows = list(rows_of(source))
    prompts = [prompt_of(row, source, number) for number, row in enumerate(rows)]
    if not prompts:
        raise ValueError(f"prompt set {source.source!r} is empty")
    return prompts


def rows_of(source: PromptSource) -> Iterable[dict[str, Any]]:
    if source.source == BUILT_IN:
        if source.split not in ("train", "test"):
            raise ValueError(f"{BUILT_IN} has the splits train and test, not {source.split!r}")
        file = resources.files("peagle.tiny_target") / f"prompts_{source.split}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines()
    elif source.source.endswith(".jsonl"):
        path = Path(source.source)
        if not path.exists():
            raise ValueError(f"prompt file {path} does not exist")
        lines = path.read_text(encoding="utf-8").splitlines()
    else:
        return hub_rows(source)
    return (json.loads(line) for line in lines[: source.limit] if line.strip())


def hub_rows(source: PromptSource) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset  # takes seconds to import

    try:
        rows = load_dataset(source.source, source.subset, split=source.split, streaming=True)
    except Exception as error:  # the client raises many kinds; all mean the set cannot be had
        raise ValueError(f"data set {source.source!r} cannot be loaded: {error}") from error
    return rows if source.limit is None else rows.take(source.limit)


def prompt_of(row: dict[str, Any], source: PromptSource, number: int) -> Prompt:
    column = source.column or next((c for c in COLUMNS if c in row), None)
    if column is None or column not in row:
        wanted = source.column or "any of " + ", ".join(COLUMNS)
        raise ValueError(f"row {number} of {source.source!r} has no column {wanted}")
    value = row[column]
    name = f"row {number} of {source.source!r}"
    if isinstance(value, str):
        messages = [{"role": "user", "content": value}]
    elif value and isinstance(value[0], str):
        messages = [{"role": "user", "content": text} for text in value]
    else:
        messages = [message_of(said, name) for said in value or ()]
    # Past a tool's result nobody could go on: it answers a call that the target may not make.
    open_ended = list(takewhile(lambda message: message["role"] != "tool", messages))
    turns = tuple(m["content"] for m in open_ended if m["role"] == "user")
    system = next((m["content"] for m in messages if m["role"] in ("system", "developer")), None)
    if not turns or not all(turns):
        raise ValueError(f"{name} has an empty prompt")
    whole = messages if any(m["role"] == "assistant" for m in messages) else ()
    return Prompt(f"{source.name}/{number}", system, turns, tools_of(row, name), tuple(whole))


def message_of(said: dict[str, Any], name: str) -> dict[str, Any]:
    """A message of OpenAI's or ShareGPT's form, in OpenAI's."""
    role = said.get("role") or said.get("from")
    content = said["content"] if "content" in said else said.get("value")
    if isinstance(content, list):
        if any(part.get("type") != "text" for part in content):
            raise ValueError(f"{name} holds images or sound: only text can be drafted")
        content = "".join(part["text"] for part in content)
    if not role or (content is None and not said.get("tool_calls")):
        raise ValueError(f"{name} has a message without role or content")
    rest = {k: v for k, v in said.items() if k not in ("from", "value") and v is not None}
    return {**rest, "role": ROLES.get(role, role), "content": content or ""}


def tools_of(row: dict[str, Any], name: str) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers, as a list or as JSON."""
    tools = row.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: its tools are not JSON ({error})") from error
    return tuple(tools)
