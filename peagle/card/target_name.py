"""What the Hub calls a target that lies in a folder, as far as the folder itself knows."""

import re
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import ModelCard

from peagle.card.run_files import is_hub_id, read_json

CACHE = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]{40})")


class HubName(NamedTuple):
    """A Hub id, the commit where it is known, and where both were found."""

    hub_id: str
    revision: str | None
    source: str


def hub_name_of(folder: Path) -> HubName | None:
    """The Hub id of a target in a folder; None where nothing tells it.

    The place in the Hub's cache is certain. Else ``_name_or_path`` of config.json and the model's
    name in the README's front matter count, if they have the form of a Hub id. ``base_model`` there
    does not count: it names the model that this one was made from.
    """
    if not folder.is_dir():
        return None
    folder = folder.resolve()
    if cached := CACHE.search(folder.as_posix()):
        return HubName(f"{cached[1]}/{cached[2]}", cached[3], "its place in the Hub's cache")
    try:
        name = read_json(folder / "config.json").get("_name_or_path")
        if is_hub_id(name):
            return HubName(name, None, "_name_or_path of its config.json")
        readme = folder / "README.md"
        if readme.is_file():
            name = ModelCard(readme.read_text("utf-8"), ignore_metadata_errors=True).data.model_name
            if is_hub_id(name):
                return HubName(name, None, "the front matter of its README.md")
    except Exception:  # the client raises whatever a page brings; an unreadable name is none
        pass
    return None
