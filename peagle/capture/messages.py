"""Messages as data sets write them, read into OpenAI's form."""

import json
import re
from contextlib import suppress
from typing import Any

Message = dict[str, Any]

ROLES = {
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",  # LLaMA-Factory's: the content is the call
    "system": "system",
    "developer": "developer",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
TEXT_PARTS = (None, "text", "input_text", "output_text")


def read_messages(value: Any, name: str) -> list[Message]:
    """A text, a user's texts turn by turn, or a conversation of OpenAI's or ShareGPT's form."""
    value = unpacked(value) if isinstance(value, str) else value
    if isinstance(value, dict):  # how ``datasets`` may hand out a list of objects
        lists = value.values()
        if all(isinstance(x, list) for x in lists) and len({len(x) for x in lists}) == 1:
            value = [dict(zip(value, entries, strict=True)) for entries in zip(*lists, strict=True)]
    items = [value] if isinstance(value, str) else value or []
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return [{"role": "user", "content": text} for text in items]
    if isinstance(items, list) and all(isinstance(item, dict) for item in items):
        return [read_message(item, name) for item in items]
    raise ValueError(f"{name} must hold a text, texts, or messages, not {short_json(value)}")


def unpacked(text: str) -> Any:
    """The messages, where a text is their JSON, as CSV and many Parquet files hold them."""
    if re.match(r"\s*\[\s*\{", text):
        with suppress(json.JSONDecodeError, RecursionError):
            found = json.loads(text)
            if all(isinstance(m, dict) and ("role" in m or "from" in m) for m in found):
                return found
    return text


def read_conversation(value: Any, name: str) -> list[Message]:
    """As ``read_messages``; the messages may be JSON in a text."""
    if isinstance(value, str) and re.match(r"\s*(\[\s*)?\{", value):
        value = read_json(value, f"{name}: its messages")
    messages = read_messages(value, name)
    if len(messages) > 1 and isinstance(value, list) and isinstance(value[0], str):
        raise ValueError(
            f"{name} has a conversation of texts alone: write messages with a role, or give the "
            "user's texts in a column 'turns'"
        )
    return messages


def read_pairs(value: Any, name: str) -> list[Message]:
    """Earlier turns as pairs of what was asked and what was answered."""
    pairs = value if isinstance(value, list) else [value]
    messages: list[Message] = []
    for pair in pairs:
        if not isinstance(pair, list) or [type(text) for text in pair] != [str, str]:
            raise ValueError(f"{name}: its history must be pairs of texts, not {short_json(pair)}")
        roles = zip(("user", "assistant"), pair, strict=True)
        messages += [{"role": role, "content": text} for role, text in roles]
    return messages


def read_message(item: dict[str, Any], name: str) -> Message:
    """A message of OpenAI's or ShareGPT's form, in OpenAI's."""
    said = item.get("role") or item.get("from")
    content = item.get("content")
    content = read_text(item.get("value") if content is None else content, name)
    calls = item.get("tool_calls") or item.get("function_call")
    if isinstance(said, str) and said.lower() == "function_call":
        calls, content = content, None
    if not isinstance(said, str) or (content is None and not calls):
        raise ValueError(f"{name} has a message without role or content")
    if said.lower() not in ROLES:
        known = "user, assistant, system, developer and tool"
        raise ValueError(f"{name} has a message of the role {said!r}: the roles are {known}")
    dropped = ("from", "value", "function_call")
    rest = {k: v for k, v in item.items() if k not in dropped and v is not None}
    tool_calls = {"tool_calls": read_calls(calls, name)} if calls else {}
    return {**rest, "role": ROLES[said.lower()], "content": content or "", **tool_calls}


def read_text(content: Any, name: str) -> str | None:
    """A message's text; parts of text are joined."""
    if isinstance(content, list):
        return "".join(read_part(part, name) for part in content)
    if not isinstance(content, str | None):
        raise ValueError(f"{name} has a message whose content is {short_json(content)}, not text")
    return content


def read_part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else short_json(part)
    if kind not in TEXT_PARTS:
        raise ValueError(f"{name} holds images, sound or the like ({kind}): only text is drafted")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"{name} has a part of text without text")
    return part["text"]


def read_calls(calls: Any, name: str) -> list[dict[str, Any]]:
    """Tool calls as templates expect them: in OpenAI's form, with the arguments as an object."""
    what = f"{name}: its tool calls"
    calls = read_json(calls, what) if isinstance(calls, str) else calls
    return [read_call(call, what) for call in (calls if isinstance(calls, list) else [calls])]


def read_call(call: Any, what: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ValueError(f"{what} must be objects with a function's name, not {short_json(call)}")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = read_json(arguments, what) if arguments.strip() else {}
    rest = call if "function" in call else {"type": "function"}
    return {**rest, "function": {**function, "arguments": arguments or {}}}


def read_tools(tools: Any, name: str) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers, as a list or as JSON, in OpenAI's form."""
    tools = read_json(tools, f"{name}: its tools") if isinstance(tools, str) else tools
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"{name}: its tools must be a list of objects, not {short_json(tools)}")
    whole = [t if "function" in t else {"type": "function", "function": t} for t in tools]
    for tool in whole:
        function = tool["function"]
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise ValueError(f"{name}: a tool has no name: {short_json(tool)}")
    return tuple(whole)


def read_json(text: str, what: str) -> Any:
    """Raises ``ValueError`` with ``what`` the text is."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{what} are not JSON ({error})") from error
    except RecursionError as error:
        raise ValueError(f"{what} are nested too deep") from error


def short_json(value: Any) -> str:
    """A value as JSON, to be named in a sentence."""
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "..."
