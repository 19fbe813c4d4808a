"""The command line before it is parsed: what it must not hold, and what jsonargparse gets."""

import re
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterator
from os.path import expanduser
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from peagle.store.disk import existing

OLD_NAMES = {
    r"(?<![\w./])callbacks\.(average|checkpoint|evaluate|hub|progress|record|signals)\.[A-Z]\w+": (
        "write peagle.callbacks in place of callbacks"
    ),
    r"peagle\.module\.LinearSchedule\b": "LinearSchedule is peagle.train.schedule.LinearSchedule",
    r"peagle\.optimizer\.MuonAdamW\b": "MuonAdamW is peagle.train.optimizer.MuonAdamW",
    r"(?m)(--model\.|^\s*)deeper_rows\b": "leave it out, the rows of all anchors are trained",
}
HUB_TOKEN = re.compile(r"hf_[A-Za-z0-9]{30,}")


def given_texts(arguments: list[str]) -> dict[str, str]:
    """The command line and every configuration file that it names.

    Raises:
        ValueError: for a configuration that is not UTF-8. Prompts are read elsewhere.
    """
    texts = {"the command line": " ".join(arguments)}
    for path in (Path(argument.rpartition("=")[2]) for argument in arguments):
        if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
            strictly = "replace" if path.suffix == ".json" else "strict"
            try:
                texts[str(path)] = path.read_text("utf-8", strictly)
            except UnicodeDecodeError as error:
                raise ValueError(f"{path} is not UTF-8 ({error}): save it as UTF-8") from error
    return texts


def refuse_old_names(arguments: list[str]) -> None:
    """Raise ``ValueError`` for names of version 0.1, with those of today."""
    for place, text in given_texts(arguments).items():
        if place.endswith(".json"):  # prompts, which may say anything
            continue
        for old, new in OLD_NAMES.items():
            if found := re.search(old, text):
                raise ValueError(f"{place} has {found[0].strip()}, a name of peagle 0.1: {new}")


def refuse_tokens(arguments: list[str]) -> None:
    """Raise ``ValueError`` for a Hub token, which logs, errors and the run's files would repeat."""
    for place, text in given_texts(arguments).items():
        if HUB_TOKEN.search(text):
            raise ValueError(
                f"{place} holds a Hub token: take it out, then set HF_TOKEN or run `hf auth login`"
            )


def refuse_repeated_keys(arguments: list[str]) -> None:
    """Raise ``ValueError`` for a key that a file gives twice: YAML would drop the first unsaid."""
    for place, text in given_texts(arguments).items():
        if not place.endswith((".yaml", ".yml")):
            continue
        try:
            tree = yaml.compose(text, yaml.SafeLoader)
        except yaml.YAMLError:  # jsonargparse says what is wrong
            continue
        for key in repeated_keys(tree):
            line = key.start_mark.line + 1
            raise ValueError(
                f"line {line} of {place} gives {key.value} a second time: join the two, or leave "
                "one out"
            )


def repeated_keys(node: yaml.Node | None) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from repeated_keys(item)
    elif isinstance(node, yaml.MappingNode):
        known = set()
        for key, value in node.value:
            if str(key.value) in known:
                yield key
            known.add(str(key.value))
            yield from repeated_keys(value)


class PathError(ValueError, ArgumentTypeError):
    """Both, since jsonargparse shows the words of the first alone, and argparse of the second."""


def folder_path(path: str) -> str:
    """A folder that may not be there yet. Raises ``ValueError`` where a file is in its place."""
    path = expanduser(path)
    if "://" not in path and (place := existing(Path(path))).is_file():
        raise PathError(f"{place} is a file, and a folder is needed: give another path")
    return path


class ArgumentType(NamedTuple):
    """What an argument is made into; ``--help`` shows the name."""

    name: str
    convert: Callable[[str], str]

    def __call__(self, value: Any) -> str:
        if value is None:
            raise PathError("it is needed: give a --config that has it, or the argument itself")
        return self.convert(value)

    def __repr__(self) -> str:
        return self.name


PATH, FOLDER = ArgumentType("path", expanduser), ArgumentType("folder", folder_path)


def expand_home(arguments: list[str]) -> list[str]:
    """Write ``~`` out, which a shell leaves alone after ``=``."""
    parts = [argument.partition("=") for argument in arguments]
    return [f"{expanduser(key)}{sign}{expanduser(value)}" for key, sign, value in parts]


def replacing_lists(arguments: list[str]) -> list[str]:
    """Empty a list of settings where it is given again, so that the later one replaces it whole.

    jsonargparse merges lists of equal length element by element: a prompt set would inherit
    column, subset and limit of the set that it replaces.
    """
    given: set[str] = set()
    result: list[str] = []
    for n, argument in enumerate(arguments):
        key, sign, value = argument.partition("=")
        if key.startswith("-"):
            value = value if sign else "".join(arguments[n + 1 : n + 2])
            name = key.lstrip("-")
            settings = read_yaml(value)
            tree = settings if name in ("c", "config") else {name: settings}
            lists = set(lists_of_settings(tree))
            result += [f"--{found}=[]" for found in sorted(lists & given)]
            given |= lists
        result.append(argument)
    return result


def read_yaml(value: str) -> Any:
    """What a value says, itself or in the file that it names; ``None`` if nothing."""
    try:
        path = Path(value)
        named = path.suffix in (".yaml", ".yml", ".json") and path.is_file()
        return yaml.safe_load(path.read_text() if named else value)
    except (yaml.YAMLError, OSError, ValueError):  # jsonargparse says what is wrong
        return None


def lists_of_settings(tree: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of the lists with settings in them, as far as names alone lead there."""
    if isinstance(tree, dict) and "class_path" not in tree:
        for key, value in tree.items():
            yield from lists_of_settings(value, f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(tree, list) and any(isinstance(item, dict) for item in tree):
        yield prefix


def underscored(arguments: list[str]) -> list[str]:
    """``--vllm-python`` is as good as ``--vllm_python``."""
    return [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), argument)
            for argument in arguments]  # fmt: skip


def refuse_save_dir(arguments: list[str]) -> None:
    """Raise ``ValueError``, rather than not do as asked: ``--run_dir`` decides."""
    if any(re.match(r"--trainer\.logger\.(init_args\.)?save_dir\b", a) for a in arguments):
        raise ValueError("leave out save_dir: what a logger writes goes into --run_dir")
    if any(re.match(r"--trainer\.default_root_dir\b", a) for a in arguments):
        raise ValueError("leave out trainer.default_root_dir: a run writes into --run_dir")
