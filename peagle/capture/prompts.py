"""Where prompts come from: the built-in set, a JSONL file, or a data set on the Hub.

Only the user's side is used, unless a run asks for the answers in the data: answers should be the
target's own (paper section 4.1), since a drafter that learns somebody else's text guesses tokens
its target would not write.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, NamedTuple

from peagle.capture.columns import COLUMNS, read_messages, read_tools, short_json

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

    def opening(self) -> list[dict[str, str]]:
        """The messages up to the target's first answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.turns[0]}]

    def options(self, given: dict[str, Any] | None) -> dict[str, Any]:
        """What the chat template is given besides the messages: its options, and the tools."""
        tools = {"tools": list(self.tools)} if self.tools else {}
        return {**(given or {}), **tools}


@dataclass(frozen=True)
class PromptSource:
    """A prompt set.

    Args:
        source: ``stdlib`` (built in), the path of a ``.jsonl`` file, a Hub data set id, or one of
            gsm8k, humaneval, mt_bench, speed_bench, ultrachat, opencodeinstruct.
        split: ``train`` or ``test`` of the built-in set; any split name of a Hub data set.
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
        return Path(self.source).stem if self.source.endswith(".jsonl") else self.source

    @property
    def on_hub(self) -> bool:
        return self.source != BUILT_IN and not self.source.endswith(".jsonl")

    def address(self) -> HubDataset:
        """Where a set of the Hub is; what the source says goes before what its name stands for."""
        named = SHORT_NAMES.get(self.source, HubDataset(self.source))
        given = {"split": self.split, "column": self.column, "subset": self.subset}
        return named._replace(**{key: value for key, value in given.items() if value})


def refuse_equal_names(sources: Sequence[PromptSource]) -> None:
    """Raise ``ValueError`` when two sets share a name: their prompts and figures would mix."""
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
        content = load_prompts(source)
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def load_prompts(source: PromptSource) -> list[Prompt]:
    """Read a prompt set, in its own order.

    Raises:
        ValueError: if the set is missing, empty, damaged, or has no column with prompts.
    """
    rows = islice(read_rows(source), source.limit)
    prompts = [read_prompt(row, source, number) for number, row in enumerate(rows)]
    if not prompts:
        raise ValueError(f"prompt set {source.source!r} is empty")
    return prompts


def read_rows(source: PromptSource) -> Iterable[dict[str, Any]]:
    if source.on_hub:
        return stream_from_hub(source)
    if source.source == BUILT_IN:
        split = source.split or "train"
        if split not in ("train", "test"):
            raise ValueError(f"{BUILT_IN} has the splits train and test, not {split!r}")
        return read_jsonl(
            Path(str(resources.files("peagle.tiny_target") / f"prompts_{split}.jsonl"))
        )
    path = Path(source.source)
    if not path.is_file():
        raise ValueError(f"prompt file {path} does not exist")
    return read_jsonl(path)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Raises ``ValueError`` with file and line for what is not an object in JSON."""
    with open(path, "rb") as file:  # bytes end a line at \n only; a text may hold other line ends
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            name = f"{path}, line {number}"
            try:
                row = json.loads(line.strip().decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} is not UTF-8 text") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{name} is not JSON ({error.msg} column {error.colno})"
                ) from error
            if not isinstance(row, dict):
                what = 'must be an object as {"prompt": "..."} is'
                raise ValueError(f"{name} {what}, not {short_json(row)}")
            yield row


def stream_from_hub(source: PromptSource) -> Iterable[dict[str, Any]]:
    from datasets import load_dataset  # takes seconds to import

    repository, split, _, subset = source.address()
    try:
        return load_dataset(
            repository, subset, split=split, revision=source.revision, streaming=True
        )
    except Exception as error:  # the client raises many kinds; all mean the set cannot be had
        raise ValueError(f"data set {repository!r} cannot be loaded: {error}") from error


def read_prompt(row: dict[str, Any], source: PromptSource, number: int) -> Prompt:
    """One row's prompt. Raises ``ValueError`` with the row's number for what is none."""
    wanted = source.address().column if source.on_hub else source.column
    column = wanted or next((c for c in COLUMNS if c in row), None)
    name = f"row {number} of {source.source!r}"
    if column is None or column not in row:
        raise ValueError(f"{name} has no column {wanted or 'any of ' + ', '.join(COLUMNS)}")
    messages = COLUMNS.get(column, read_messages)(row[column], name)
    # Past a tool's result nobody could go on: it answers a call that the target may not make.
    before_tools = list(takewhile(lambda message: message["role"] != "tool", messages))
    turns = tuple(m["content"] for m in before_tools if m["role"] == "user")
    system = next((m["content"] for m in messages if m["role"] in ("system", "developer")), None)
    if not turns or not all(turns):
        raise ValueError(f"{name} has an empty prompt")
    if any(turn.startswith(WITHHELD) for turn in turns):
        raise ValueError(
            f"{name} is a placeholder: the authors of the data set have a script that fetches the "
            "text; run it, and give the .jsonl file that it writes"
        )
    whole = messages if any(m["role"] == "assistant" for m in messages) else ()
    return Prompt(f"{source.name}/{number}", system, turns, read_tools(row, name), tuple(whole))
