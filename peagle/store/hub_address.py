"""Addresses on the Hub: ``hf://OWNER/NAME/PATH@REVISION``, of a data set ``hf://datasets/...``.

One spelling for whatever this project reads there. A revision is a branch, a tag or a commit, and
must be given: what a run read can then be said, and read again.
"""

import re
from typing import NamedTuple

FORM = re.compile(
    r"hf://(?P<kind>datasets/)?(?P<repo>[^/@:]+/[^/@:]+)(/(?P<path>[^@:]+))?@(?P<revision>[^@:]+)"
)


class HubAddress(NamedTuple):
    """A file or folder at a revision of a repository; an empty path is all of it."""

    kind: str  # "model" or "dataset"
    repo: str
    path: str
    revision: str

    def __str__(self) -> str:
        kind = "datasets/" if self.kind == "dataset" else ""
        path = f"/{self.path}" if self.path else ""
        return f"hf://{kind}{self.repo}{path}@{self.revision}"

    def inside(self, name: str) -> str:
        """Path of a file of this folder within the repository."""
        return f"{self.path}/{name}" if self.path else name


def parse_address(text: str) -> HubAddress | None:
    """``None`` for what is written otherwise; a path may end with one slash.

    Raises:
        ValueError: for a path that a cache's folder could not have, or that leads out of it.
    """
    found = FORM.fullmatch(text)
    if found is None:
        return None
    kind, path = "dataset" if found["kind"] else "model", ""
    if found["path"] is not None:
        path = found["path"].removesuffix("/")
        if {"", ".", ".."} & set(path.split("/")):
            raise ValueError(
                f"{text}: the path on the Hub has an empty part, . or ..: write it without"
            )
    return HubAddress(kind, found["repo"], path, found["revision"])
