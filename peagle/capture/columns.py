"""Which columns of a data set hold a prompt, and how messages are made of them."""

import json
from collections.abc import Callable
from typing import Any

Message = dict[str, Any]

ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "function": "tool",
    "observation": "tool",
}  # ShareGPT's names


def read_messages(value: Any, name: str) -> list[Message]:
    """A text, a user's texts turn by turn, or a conversation of OpenAI's or ShareGPT's form."""
    items = [value] if isinstance(value, str) else value or []
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return [{"role": "user", "content": text} for text in items]
    if isinstance(items, list) and all(isinstance(item, dict) for item in items):
        return [read_message(item, name) for item in items]
    raise ValueError(f"{name} must hold a text, texts, or messages, not {short_json(value)}")


def read_message(item: dict[str, Any], name: str) -> Message:
    """A message of OpenAI's or ShareGPT's form, in OpenAI's."""
    role = item.get("role") or item.get("from")
    content = item["content"] if "content" in item else item.get("value")
    if isinstance(content, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in content):
            raise ValueError(f"{name} holds images or sound: only text can be drafted")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise ValueError(f"{name} has a message whose content is {short_json(content)}, not text")
    if not isinstance(role, str) or (content is None and not item.get("tool_calls")):
        raise ValueError(f"{name} has a message without role or content")
    rest = {k: v for k, v in item.items() if k not in ("from", "value") and v is not None}
    return {**rest, "role": ROLES.get(role, role), "content": content or ""}


def read_tools(row: dict[str, Any], name: str) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers, as a list or as JSON."""
    tools = row.get("tools") or []
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise ValueError(f"{name}: its tools are not JSON ({error})") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{name}: its tools must be a list of objects, not {short_json(tools)}")
    return tuple(tools)


def short_json(value: Any) -> str:
    """A value as JSON, to be named in a sentence."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."


# Where a row may have its prompt: the first of these columns that it has. To accept another column
# add a line: its name, and the function that makes messages of its value. That function gets the
# row's name too, for its errors.
COLUMNS: dict[str, Callable[[Any, str], list[Message]]] = {
    "messages": read_messages,  # OpenAI's form
    "conversations": read_messages,  # ShareGPT's
    "turns": read_messages,  # the user's texts alone
    "prompt": read_messages,
    "question": read_messages,
    "instruction": read_messages,
}
