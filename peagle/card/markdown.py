"""How a value becomes Markdown that cannot leave its place on the page."""

import math
import re
from pathlib import PurePath
from typing import Any

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"


def as_number(value: Any) -> float | None:
    """``value`` as a finite float, None for everything that is not a measurement."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def one_line(value: Any) -> str:
    """One line of printable characters: no value can start a line, a fence or a document."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(value)).split())


def as_code(value: Any) -> str:
    """``value`` as inline code, fenced by more backticks than it holds; absent, it says so."""
    if value is None or value == "":
        return NOT_RECORDED
    content = one_line(value).replace("|", r"\|")
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", content)), default=0))
    pad = " " if content.startswith("`") or content.endswith("`") else ""
    return f"{fence}{pad}{content}{pad}{fence}"


def as_text(value: Any, digits: int | None = None) -> str:
    """``value`` as prose, all that Markdown reads escaped; absent, it says so."""
    if value is None or value == "" or value == []:
        return NOT_RECORDED
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:g}" if digits is None else f"{value:,.{digits}f}"
    if isinstance(value, list | tuple):
        return ", ".join(as_text(item) for item in value)
    return re.sub(r"([\\`*_\[\]<>#~&!|])", r"\\\1", one_line(value))


def as_measurement(value: Any, digits: int) -> str:
    """``value`` with so many digits; what is no finite number was not measured."""
    return NOT_MEASURED if as_number(value) is None else f"{value:,.{digits}f}"


def without_folders(text: str | None) -> str | None:
    """``text`` with each absolute path cut to its last part: the folders are nobody's business."""
    if text is None:
        return None
    return re.sub(r"(?<![\w.:/])~?/[^\s'\"]*", lambda path: PurePath(path[0]).name, text)
