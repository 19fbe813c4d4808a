"""Where prompts come from: the built-in set, a file or folder, or a data set on the Hub.

Only the user's side is used, unless a run asks for the answers in the data: answers should be the
target's own (paper section 4.1), since a drafter that learns somebody else's text guesses tokens
its target would not write.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from peagle.capture.columns import SYSTEM_ROLES, read_row
from peagle.capture.rows import Row, is_local, kind_of, numbered, read_local
from peagle.store.errors import reason

BUILT_IN = "stdlib"
WITHHELD = "FULL BENCHMARK DATA SHOULD BE FETCHED"  # SPEED-Bench's, where it may not publish


class HubDataset(NamedTuple):
    """Where a data set lies on the Hub."""

    repository: str
    split: str = "train"
    column: str | None = None
    subset: str | None = None


SHORT_NAMES = {
    "gsm8k": HubDataset("openai/gsm8k", "train", "question", "main"),
    "humaneval": HubDataset("openai/openai_humaneval", "test", "prompt"),
    "mt_bench": HubDataset("HuggingFaceH4/mt_bench_prompts", "train", "prompt"),
    "speed_bench": HubDataset("nvidia/SPEED-Bench", "test", "turns", "qualitative"),
    "ultrachat": HubDataset("HuggingFaceH4/ultrachat_200k", "train_sft", "messages"),
    "opencodeinstruct": HubDataset("nvidia/OpenCodeInstruct", "train", "input"),
}


class Prompt(NamedTuple):
    """The turns of one conversation that the target answers, one by one."""

    id: str
    system: str | None
    turns: tuple[str, ...]
    tools: tuple[dict[str, Any], ...] = ()  # that the target may call, in OpenAI's form
    messages: tuple[dict[str, Any], ...] = ()  # the whole conversation, where the data hold one
    # No part of what it says:
    place: str = "a prompt"  # where it was read, for errors
    unanswered: bool = False  # the data have its last answer where it is not read

    @property
    def content(self) -> tuple[Any, ...]:
        """All that it says, with its id."""
        return self[:-2]

    def opening(self) -> list[dict[str, str]]:
        """The messages up to the target's first answer."""
        said = self.system is not None  # an empty one keeps out a template's own
        system = [{"role": "system", "content": self.system}] if said else []
        return [*system, {"role": "user", "content": self.turns[0]}]

    def answered(self) -> list[dict[str, Any]]:
        """The conversation of the data up to its last answer; raises ``ValueError`` without one."""
        if self.unanswered:
            raise ValueError(
                f"{self.place} has its last answer beside its history, where it is not read: set "
                "regenerate: true, or write whole conversations as messages"
            )
        roles = [message["role"] for message in self.messages]
        if "assistant" not in roles:
            raise ValueError(
                f"{self.place} has no answers of an assistant: set regenerate: true, or name the "
                "column with whole conversations"
            )
        for message in self.messages:
            for key in ("weight", "train"):
                if message["role"] == "assistant" and message.get(key) in (0, "0"):
                    raise ValueError(
                        f"{self.place} has an answer that is not to be trained ({key}: "
                        f"{message[key]}), and answers of the data are all trained: take the row "
                        "out, or set regenerate: true"
                    )
        return list(self.messages[: len(roles) - roles[::-1].index("assistant")])

    def asked_id(self) -> str:
        """Hash of what it asks, whatever is answered; decides its split."""
        messages = [self.system, *self.turns]
        return hashlib.sha256(json.dumps(messages, ensure_ascii=False).encode()).hexdigest()[:16]

    def options(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """What the chat template is given besides the messages: its options, and the tools."""
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {**(given or {}), **tools}


@dataclass(frozen=True)
class PromptSource:
    """A prompt set.

    Args:
        source: ``stdlib`` (built in), the path of a file (.jsonl, .json, .parquet, .csv, .tsv or
            .txt, also .gz) or folder, a Hub data set id, or one of gsm8k, humaneval, mt_bench,
            speed_bench, ultrachat, opencodeinstruct.
        split: ``train`` or ``test`` of the built-in set; any split name of a folder's or the Hub's.
            Default: ``train``, or what the short name stands for.
        subset: which configuration of a Hub data set, where it has several (GSM8K's ``main``).
        column: where the prompt is; found by itself when it is one of the usual names.
        limit: use only the first so many.
        revision: of a Hub data set.
        label: name in tables, where two sets would have the same.
    """

    source: str
    split: str | None = None
    column: str | None = None
    limit: int | None = None
    subset: str | None = None
    revision: str | None = None
    label: str | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, got {self.limit}")

    @property
    def name(self) -> str:
        """Short name for tables: ``humaneval`` for ``data/humaneval.jsonl``."""
        if self.label:
            return self.label
        if self.source == BUILT_IN:
            return f"{BUILT_IN}-{self.split or 'train'}"
        if self.on_hub:
            return self.source
        path = Path(self.source.removesuffix(".gz"))
        return path.stem if kind_of(path) else path.name

    @property
    def on_hub(self) -> bool:
        if self.source in SHORT_NAMES:
            return True
        return self.source != BUILT_IN and not is_local(self.source)

    def address(self) -> HubDataset:
        """Where a set of the Hub is; what the source says goes before what its name stands for."""
        named = SHORT_NAMES.get(self.source, HubDataset(self.source))
        given = {"split": self.split, "column": self.column, "subset": self.subset}
        return named._replace(**{key: value for key, value in given.items() if value})


def check_sources(sources: Sequence[PromptSource], section: str) -> None:
    """Raise ``ValueError`` if there is no set, or two of one name, whose figures would mix."""
    if not sources:
        raise ValueError(f"{section}.prompts names no prompt set")
    names = [source.name for source in sources]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two prompt sets are called {name!r}: give one of them another name (label: ...)"
            )


def prompt_set_hash(source: PromptSource) -> str:
    """Hash of all that a prompt set says; of a Hub set, of where and which it is.

    So a finished store is known again without network; ``revision`` pins what lies at the address.
    """
    if source.on_hub:
        content: Any = [source.name, *source.address(), source.limit, source.revision]
    else:
        content = [prompt.content for prompt in load_prompts(source)]
    return hashlib.sha256(json.dumps(content, default=str).encode()).hexdigest()[:16]


def load_prompts(source: PromptSource) -> list[Prompt]:
    """Read a prompt set, in its own order.

    Raises:
        ValueError: if the set is missing, empty, damaged, or has no column with prompts.
    """
    wanted = source.address().column if source.on_hub else source.column
    rows = islice(read_rows(source), source.limit)
    prompts = [
        read_prompt(row, f"{source.name}/{number}", wanted) for number, row in enumerate(rows)
    ]
    if not prompts:
        raise ValueError(f"prompt set {source.source!r} is empty")
    return prompts


def read_rows(source: PromptSource) -> Iterator[Row]:
    if source.on_hub:
        return stream_from_hub(source)
    refuse_unused(source)
    split = source.split or "train"
    if source.source == BUILT_IN:
        if split not in ("train", "test"):
            raise ValueError(f"{BUILT_IN} has the splits train and test, not {split!r}")
        built_in = resources.files("peagle.tiny_target") / f"prompts_{split}.jsonl"
        return read_local(Path(str(built_in)), split)
    return read_local(Path(source.source).expanduser(), split)


def refuse_unused(source: PromptSource) -> None:
    """Raise ``ValueError`` for what only a set of the Hub has, and for a split where none is."""
    given = {"subset": source.subset, "revision": source.revision}
    path = Path(source.source).expanduser()
    if source.source != BUILT_IN and (kind_of(path) or (path / "state.json").exists()):
        given["split"] = source.split
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{source.source} has no {name}: leave out {name}: {value}")


def stream_from_hub(source: PromptSource) -> Iterator[Row]:
    from datasets import load_dataset  # takes seconds to import

    repository, split, _, subset = source.address()
    try:
        rows = load_dataset(
            repository, subset, split=split, revision=source.revision, streaming=True
        )
    except Exception as error:  # the client raises many kinds; all mean the set cannot be had
        raise ValueError(f"data set {repository!r} cannot be loaded: {reason(error)}") from error
    return numbered(rows, repository)


def read_prompt(row: Row, id_: str, wanted: str | None) -> Prompt:
    """One row's prompt. Raises ``ValueError`` with the row's place for what is none."""
    messages, tools, unanswered = read_row(row.content, row.place, wanted)
    # Past a tool's result nobody could go on: it answers a call that the target may not make.
    before_tools = list(takewhile(lambda message: message["role"] != "tool", messages))
    turns = tuple(m["content"] for m in before_tools if m["role"] == "user")
    system = next((m["content"] for m in messages if m["role"] in SYSTEM_ROLES), None)
    if not turns or not all(turn.strip() for turn in turns):
        raise ValueError(f"{row.place} has an empty prompt")
    if any(turn.startswith(WITHHELD) for turn in turns):
        raise ValueError(
            f"{row.place} is a placeholder: the authors of the data set have a script that fetches "
            "the text; run it, and give the .jsonl file that it writes"
        )
    whole = messages if any(m["role"] == "assistant" for m in messages) else ()
    if not whole:
        refuse_late_system(messages, row.place)
    prompt = Prompt(id_, system, turns, tools, tuple(whole), row.place, unanswered)
    try:
        json.dumps(prompt.content, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a character
        raise ValueError(f"{row.place} holds half of a surrogate pair, which is no text") from error
    return prompt


def refuse_late_system(messages: Sequence[dict[str, Any]], place: str) -> None:
    """Raise ``ValueError`` where a system message is not the first: it would not be asked."""
    if any(message["role"] in SYSTEM_ROLES for message in messages[1:]):
        raise ValueError(f"{place} has a system message that is not its first and only one")
