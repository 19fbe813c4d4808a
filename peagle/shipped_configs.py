"""``python -m peagle configs``, and ``--config NAME`` for the configurations that ship with peagle.

--config NAME  ->  the file NAME, else NAME.yaml beside it, else the shipped NAME
"""

import argparse
import re
import sys
from importlib import resources
from pathlib import Path

import yaml


def shipped() -> dict[str, Path]:
    """Name -> file of each configuration that ships, in alphabetical order."""
    folder = Path(str(resources.files("peagle.configs")))
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def head_of(text: str) -> dict[str, str]:
    """Key -> value of the ``# Key: value`` lines on top of a configuration.

    A line that is indented by two spaces goes on with the value above it.
    """
    fields: dict[str, str] = {}
    key = None
    for line in text.partition("\n\n")[0].splitlines():
        if start := re.match(r"# ([A-Z][a-z ]*): (.*)", line):
            key, fields[start[1]] = start[1], start[2]
        elif key and (more := re.match(r"#   (\S.*)", line)):
            fields[key] += f" {more[1]}"
        else:
            key = None
    return fields


def short(value: str) -> str:
    """What stands before the first bracket, semicolon or full stop of a head's value."""
    return re.split(r" \(|;|\. ", value)[0]


def format_configs() -> str:
    """Each shipped configuration with K, target, hardware and disk, as its file gives them."""
    lines = []
    for name, path in shipped().items():
        text = path.read_text()
        head, fields = head_of(text), yaml.safe_load(text)
        depths = f"K {fields['model']['cod']['num_depths']}"
        lines.append(f"{name:<16}{depths:<6}{fields['target']}")
        lines.append(f"{'':<22}{short(head['Hardware'])}")
        lines.append(f"{'':<22}disk: {short(head['Disk'])}")
    lines += ["", "start one: python -m peagle fit --config NAME"]
    return "\n".join([*lines, "change one: python -m peagle configs copy NAME"])


def copy_config(name: str, destination: Path | None) -> Path:
    """Copy a shipped configuration to a new file, or into a folder.

    Raises:
        ValueError: for an unknown name, a file that exists, or a folder that does not.
    """
    if name not in shipped():
        raise ValueError(f"no configuration is called {name!r}: there are {', '.join(shipped())}")
    goal = (destination or Path()).expanduser()
    goal = goal / f"{name}.yaml" if goal.is_dir() else goal
    if not goal.parent.is_dir():
        raise ValueError(f"{goal.parent} is no folder: make it first, or give another place")
    try:
        with goal.open("x") as file:
            file.write(shipped()[name].read_text())
    except FileExistsError:
        raise ValueError(f"{goal} exists and is left as it is: give another name") from None
    return goal


def run(arguments: list[str]) -> None:
    """``configs`` lists, ``configs copy NAME [DEST]`` copies."""
    parser = argparse.ArgumentParser(
        "python -m peagle configs", description="List the configurations that ship, or copy one."
    )
    actions = parser.add_subparsers(dest="action", title="without an action they are listed")
    copy = actions.add_parser("copy", help="copy one, to change it; nothing is overwritten")
    copy.add_argument("name", metavar="NAME")
    copy.add_argument("destination", metavar="DEST", nargs="?", type=Path,
                      help="file or folder; default NAME.yaml in this folder")  # fmt: skip
    given = parser.parse_args(arguments)
    if given.action is None:
        print(format_configs())
    else:
        print(f"wrote {copy_config(given.name, given.destination)}")


def with_files(arguments: list[str]) -> list[str]:
    """``arguments`` with the file in the place of each name that ``--config`` gives."""
    found = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        if before in ("-c", "--config"):
            argument = config_file(argument)
        elif argument.startswith("--config="):
            argument = f"--config={config_file(argument.removeprefix('--config='))}"
        found.append(argument)
    return found


def config_file(given: str) -> str:
    """The file that ``--config`` means; a file in the working directory wins over a shipped one.

    Raises:
        ValueError: if there is no such file, and no shipped configuration of that name.
    """
    if ":" in given:  # the settings themselves, or a URL
        return given
    if Path(given).is_file():
        return given
    own = Path(f"{given}.yaml")
    if not own.is_file() and given not in shipped():
        known = Path(given).stem in shipped()
        hint = f"the shipped one is --config {Path(given).stem}" if known else (
            "`python -m peagle configs` lists the names of those that ship")  # fmt: skip
        raise ValueError(f"--config {given}: there is no such file; {hint}")
    path = own if own.is_file() else shipped()[given]
    print(f"configuration: {path}", file=sys.stderr)
    return str(path)
