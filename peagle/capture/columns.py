"""Which columns of a data set are read, and what becomes of them."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from peagle.capture.messages import (
    Message,
    read_conversation,
    read_messages,
    read_pairs,
    read_tools,
    short_json,
)

SYSTEM_ROLES = ("system", "developer")
Use = Literal["system", "tools", "earlier", "joined", "refused", "media"]

# Where a row may have its prompt: the first of these columns that says something. To accept another
# column add a line: its name, and the function that makes messages of its value. That function gets
# the row's place too, for its errors.
COLUMNS: dict[str, Callable[[Any, str], list[Message]]] = {
    "messages": read_conversation,  # OpenAI's form
    "conversations": read_conversation,  # ShareGPT's
    "conversation": read_conversation,
    "turns": read_messages,  # the user's texts alone
    "prompt": read_messages,
    "question": read_messages,
    "query": read_messages,
    "instruction": read_messages,
    "input": read_messages,
}

# What else a row may say that the target must hear. All other columns are not read.
BESIDE: dict[str, Use] = {
    "system": "system",
    "system_prompt": "system",  # OpenOrca's
    "system_message": "system",
    "tools": "tools",
    "functions": "tools",
    "history": "earlier",  # LLaMA-Factory's
    "input": "joined",  # Alpaca's, to its instruction; refused beside any other prompt
    "context": "joined",  # Dolly's, likewise
    "passage": "refused",  # what a prompt may not be understood without
    "choices": "refused",
    "options": "refused",
    "image": "media",  # refused even where ``column`` names the prompt
    "images": "media",
    "audio": "media",
    "audios": "media",
    "videos": "media",
}
WHOLE = ("messages", "conversations", "conversation")  # which say all that there is to ask


class RowContent(NamedTuple):
    """What a row says: its messages, the system's included, and the tools that it offers."""

    messages: list[Message]
    tools: tuple[dict[str, Any], ...]
    unanswered: bool = False  # its messages end before the answer, which is in another column


def read_row(row: dict[str, Any], place: str, wanted: str | None) -> RowContent:
    """A row's content; ``wanted`` is the column of the prompt, where the user named it.

    Raises:
        ValueError: with the row's place, if it has no prompt, or a column that cannot be used.
    """
    column = wanted or next((c for c in COLUMNS if row.get(c)), None)
    column = column or next((c for c in COLUMNS if c in row), None)
    if column is None or column not in row:
        raise ValueError(f"{place} has no column {wanted or 'any of ' + ', '.join(COLUMNS)}")
    messages = COLUMNS.get(column, read_messages)(row[column], place)
    beside = {name: use for name, use in BESIDE.items() if name != column and row.get(name)}
    refuse_unused(beside, column, place, chosen=wanted is not None)
    earlier: list[Message] = []
    if messages and column == "instruction":
        earlier = [m for c in named(beside, "earlier") for m in read_pairs(row[c], place)]
        joined = [text_of(row, c, place) for c in named(beside, "joined")]
        content = "\n\n".join([messages[-1]["content"], *joined])
        messages = [*earlier, *messages[:-1], {**messages[-1], "content": content}]
    for name in named(beside, "system"):
        messages = with_system(messages, text_of(row, name, place), name, place)
    tools = [tool for name in named(beside, "tools") for tool in read_tools(row[name], place)]
    return RowContent(messages, tuple(tools), unanswered=bool(earlier))


def named(beside: dict[str, Use], use: Use) -> list[str]:
    return [name for name, its in beside.items() if its == use]


def refuse_unused(beside: dict[str, Use], column: str, place: str, *, chosen: bool) -> None:
    """Raise ``ValueError`` for a column that belongs to the prompt and would not be asked."""
    for name, use in beside.items():
        if use == "media":
            raise ValueError(f"{place} has a column {name!r}: only text is drafted")
        unused = use == "refused" or (use in ("joined", "earlier") and column != "instruction")
        if unused and column not in WHOLE and not chosen:
            raise ValueError(
                f"{place} has a column {name!r} beside its {column!r}: put both into one, or ask "
                f"the {column!r} alone (column: {column})"
            )


def text_of(row: dict[str, Any], column: str, place: str) -> str:
    if not isinstance(row[column], str):
        raise ValueError(f"{place}: its {column!r} must be a text, not {short_json(row[column])}")
    return row[column]


def with_system(messages: list[Message], text: str, column: str, place: str) -> list[Message]:
    """The messages opened by a row's own system text, unless they say the same themselves."""
    own = [m["content"] for m in messages if m["role"] in SYSTEM_ROLES]
    if own and own != [text]:
        raise ValueError(f"{place} has a column {column!r} and another system message: keep one")
    return messages if own else [{"role": "system", "content": text}, *messages]
