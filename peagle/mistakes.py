"""Which exceptions a user can mend: they end in one sentence, all others in a traceback."""

import re
from argparse import ArgumentError

# What these define themselves tells of settings, files and the network. What they raise of
# Python's own (TypeError, KeyError ...) may be a fault of ours, and keeps its traceback.
LIBRARIES = {
    "lightning",
    "jsonargparse",
    "yaml",
    "safetensors",
    "safetensors_rust",
    "transformers",
    "tokenizers",
    "datasets",
    "huggingface_hub",
    "httpx",
    "jinja2",
}
UNION = "Does not validate against"  # as jsonargparse says it, also by a ValueError
# What is said of prompt sets that are given by their names alone.
BARE_PROMPTS = re.compile(
    r"(\w+\.prompts): .*(?:class_path '|string: |value: )(?!peagle\.PromptSource)([\w./~-]+)"
)
NOISE = (UNION, "Expected a path but", "Subtypes:", "Errors:", "Given value")


def is_mistake(error: BaseException) -> bool:
    """Whether the user can mend what raised ``error``."""
    if isinstance(error, ValueError | OSError | ArgumentError):
        return True
    return library_of(error) in LIBRARIES or type(error).__name__ == "OutOfMemoryError"


def library_of(error: BaseException) -> str:
    return type(error).__module__.lstrip("_").partition(".")[0]


def sentence(error: BaseException) -> str:
    """What a user reads: our own words as they are, those of a library on one line."""
    text = str(error).strip()
    if isinstance(error, ArgumentError) or text.startswith(UNION):
        return argument_sentence(text)
    if library_of(error) in LIBRARIES:
        return " ".join(text.split()) or type(error).__name__
    return text or type(error).__name__


def argument_sentence(text: str) -> str:
    """jsonargparse lists all that it tried; only what names the fault is kept."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines()]
    lines = [line for line in lines if line and not line.startswith(NOISE)]
    causes = [n for n, line in enumerate(lines) if line.startswith("Problem with given class_path")]
    if text.startswith(UNION) and causes:  # what else a setting may be is no help then
        others = ("Expected a <class", "Not a valid subclass")
        lines = [line for line in lines[causes[0] :] if not line.startswith(others)]
    first, *rest = dict.fromkeys(lines)  # without repeats
    told = f"{first.removeprefix('Parser key ').replace(chr(34), '')} {' '.join(rest)}"
    if bare := BARE_PROMPTS.match(told):
        return f"{bare[1]} must hold settings: write [{{source: {bare[2]}}}]"
    return f"{told.strip()} (--help lists the settings)"
