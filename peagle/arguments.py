"""What the command line and its configuration files must not hold."""

import re
from pathlib import Path

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
    """The command line and every configuration file that it names."""
    texts = {"the command line": " ".join(arguments)}
    for path in (Path(argument.rpartition("=")[2]) for argument in arguments):
        if path.suffix in (".yaml", ".yml", ".json") and path.is_file():
            texts[str(path)] = path.read_text()
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
