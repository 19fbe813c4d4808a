"""Files of a folder on the Hub: what it lists, and fetching one until it came as listed."""

import hashlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from huggingface_hub import hf_hub_download, list_repo_tree
from huggingface_hub.errors import EntryNotFoundError
from huggingface_hub.hf_api import RepoFile

from peagle.store.errors import reason
from peagle.store.hub_address import HubAddress
from peagle.store.shard_cache import FetchError

WAITS = (1.0, 4.0, 16.0)  # seconds between attempts, each with the client's own retries inside

Result = TypeVar("Result")


class RemoteFile(NamedTuple):
    size: int
    sha256: str | None  # of what the Hub does not keep in git itself
    blob: str | None  # git's name of the content, where git keeps it


def list_files(address: HubAddress) -> dict[str, RemoteFile]:
    """The files of the store's folder."""
    where = {"repo_type": address.kind, "revision": address.revision}
    try:
        entries = list(list_repo_tree(address.repo, address.path or None, **where))
    except EntryNotFoundError:  # no such folder
        return {}
    return {
        entry.path.rpartition("/")[2]: RemoteFile(
            entry.size,
            entry.lfs.sha256 if entry.lfs else None,
            None if entry.lfs else entry.blob_id,
        )
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def fetch_file(address: HubAddress, name: str, listed: RemoteFile, folder: Path) -> Path:
    """Download a file of the store's folder into ``folder``, under its path in the repository.

    Raises:
        FetchError: naming the file, when it does not come as the Hub lists it.
    """

    def attempt() -> Path:
        path = folder / address.inside(name)
        path.unlink(missing_ok=True)  # the client takes what is there for whole
        where = {"repo_type": address.kind, "revision": address.revision, "local_dir": folder}
        hf_hub_download(address.repo, address.inside(name), **where)
        problem = content_problem(path, listed)
        if problem:
            path.unlink(missing_ok=True)
            raise OSError(f"it came with {problem}")
        return path

    return retry(f"{name} of {address}", attempt)


def content_problem(path: Path, listed: RemoteFile) -> str | None:
    """What tells a file from the one that the Hub lists; ``None`` if it is that one."""
    size = path.stat().st_size if path.exists() else -1
    if size != listed.size:
        return f"{size} bytes instead of {listed.size}"
    if listed.sha256:
        name, hash_, found = "sha256", listed.sha256, hashlib.sha256()
    elif listed.blob:
        name, hash_, found = "git hash", listed.blob, hashlib.sha1(usedforsecurity=False)
        found.update(b"blob %d\0" % listed.size)
    else:
        return None
    with open(path, "rb") as file:
        hashlib.file_digest(file, lambda: found)
    if found.hexdigest() != hash_:
        return f"another content than the Hub says (its {name} differs)"
    return None


def retry(what: str, attempt: Callable[[], Result]) -> Result:
    """Try again for a while what the network may have spoilt.

    Raises:
        FetchError: with what and why, when it lasts, or when the Hub refuses.
    """
    for wait in (*WAITS, None):
        try:
            return attempt()
        except Exception as error:  # the client raises whatever its transport raises
            status = getattr(getattr(error, "response", None), "status_code", None)
            # Below 500 the Hub has understood, and will answer the same again.
            final = status is not None and status < 500 and status not in (408, 429)
            if wait is None or final:
                hint = " (a private one needs HF_TOKEN or `hf auth login`)" if final else ""
                raise FetchError(f"{what} cannot be fetched: {reason(error)}{hint}") from error
            time.sleep(wait)
    raise AssertionError("the last attempt returns or raises")
