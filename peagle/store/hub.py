"""A store that lies on the Hub: read at one commit, its shards by way of a bounded cache.

``hf://datasets/OWNER/NAME/FOLDER@REVISION`` (the folder may be left out). What is small, and the
target's parts, stay in the cache; shards come and go (``peagle/store/shard_cache.py``). Nothing is
ever written there: a store is put on the Hub with the client's own ``hf upload``.
"""

import math
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import cached_assets_path, dataset_info
from huggingface_hub.utils import disable_progress_bars
from torch import Tensor

from peagle.store.errors import BadSample, StoreError
from peagle.store.hub_address import HubAddress, parse_address
from peagle.store.hub_files import (
    RemoteFile,
    content_problem,
    fetch_file,
    list_files,
    retry,
)
from peagle.store.locks import locked
from peagle.store.reader import Store
from peagle.store.sample import Sample
from peagle.store.shard_cache import ShardCache

REQUIRED = ("manifest.json", "capture.json", "target.safetensors", "target_layers.safetensors")
SHARD = re.compile(r"shard-\d{5,}\.safetensors")
INDEX_FILE = re.compile(r"shard-\d{5,}\.parquet")
COMMIT = re.compile(r"[0-9a-f]{40}")
REMEDY = "put the store on the Hub again"
PARALLEL_DOWNLOADS = 8  # small files that are fetched at a time


@dataclass(frozen=True)
class FoundStore:
    """A store on the Hub at a commit, everything but its shards at hand."""

    address: HubAddress
    files: dict[str, RemoteFile]
    folder: Path

    def __str__(self) -> str:
        return str(self.address)

    @property
    def shards(self) -> dict[str, int]:
        """Sizes in bytes."""
        return {name: f.size for name, f in self.files.items() if SHARD.fullmatch(name)}

    def fetch(self, shard: str, folder: Path) -> Path:
        """Download a shard. Raises ``FetchError`` with its name, when it does not come whole."""
        return fetch_file(self.address, shard, self.files[shard], folder)


class HubStore(Store):
    """A damaged sample is read once more from a fresh copy: only what is so on the Hub is bad."""

    def __init__(self, found: FoundStore, cache: ShardCache, *, allow_missing: bool):
        with reraise_with_address(found.address):
            super().__init__(found.folder, allow_missing=allow_missing, shards=cache)
        self.address, self.cache = found.address, cache
        self.refetch_lock = threading.Lock()

    def read(self, index: int, states: tuple[Tensor, Tensor] | None = None) -> Sample:
        shard = self.entries[index].shard
        fresh = self.refetched[shard] > 0 or not self.cache.has(shard)
        try:
            return super().read(index, states)
        except BadSample as error:
            if fresh:
                remedy = f"{REMEDY} (it is so at {self.address})"
                raise BadSample(error.place, error.problem, remedy) from error
        self.refetch(shard)
        return self.read(index, states)

    def refetch(self, shard: str) -> None:
        """Drop the copy, unless another thread that has read it too was faster."""
        with self.refetch_lock:
            if not self.refetched[shard]:
                self.cache.drop(shard)
                self.refetched[shard] += 1


@contextmanager
def reraise_with_address(address: HubAddress | None) -> Iterator[None]:
    """What is wrong with a file of a store on the Hub is said of its address, not of the cache."""
    try:
        yield
    except StoreError as error:
        if address is None:  # a folder
            raise
        raise StoreError(str(address), error.problem, REMEDY) from error


def store_address(store: str) -> HubAddress | None:
    """``None`` for a folder. Raises ``ValueError`` for what is neither that nor on the Hub."""
    if "://" not in store:
        return None
    address = parse_address(store)
    if address is None or address.kind != "dataset":
        raise ValueError(
            f"{store}: a store is a folder, or hf://datasets/OWNER/NAME/FOLDER@REVISION (without "
            "FOLDER, if it is all of the data set)"
        )
    if "/" in address.revision and not address.revision.startswith("refs/"):
        raise ValueError(
            f"{store}: the folder goes before the revision, hf://datasets/OWNER/NAME/FOLDER@"
            "REVISION; for a branch with / in its name give the commit"
        )
    return address


def find_store(address: HubAddress) -> FoundStore:
    """Say at which commit a store is read from now on, and fetch what is small.

    Raises:
        ValueError: if there is no whole store, or the Hub cannot be asked.
    """
    if not COMMIT.fullmatch(address.revision):
        info = retry(str(address), lambda: dataset_info(address.repo, revision=address.revision))
        address = address._replace(revision=info.sha)
        print(f"store {address}", file=sys.stderr)
    files = retry(str(address), lambda: list_files(address))
    if "manifest.json" not in files:
        raise ValueError(
            f"there is no store at {address}, and none is captured there: capture into a folder "
            "(--store FOLDER), and put that on the Hub with `hf upload`"
        )
    missing = [name for name in REQUIRED if name not in files]
    if missing:
        raise ValueError(f"{address} is no whole store, it has no {missing[0]}: upload it again")
    return FoundStore(address, files, fetch_small_files(address, files))


def open_store(found: FoundStore, *, cache_gb: float, allow_missing: bool) -> HubStore:
    """Raises ``ValueError`` for a cache that is too small, or larger than the disk allows."""
    sizes, limit, root = found.shards, int(cache_gb * 1e9), cache_root()
    least = 2 * max(sizes.values(), default=0)
    if limit < least:
        raise ValueError(
            f"data.cache_gb = {cache_gb:g} does not hold two shards of {found.address}: give "
            f"{math.ceil(least / 1e7) / 100:g} or more"
        )
    cache = ShardCache(root, cache_name(found.address), sizes, limit=limit, fetch=found.fetch)
    held, free = cache.used_bytes(), shutil.disk_usage(root).free
    if min(limit, sum(sizes.values())) > held + free:
        raise ValueError(
            f"data.cache_gb = {cache_gb:g} is more than {root} has room for: {free / 1e9:.3g} GB "
            f"are free, {held / 1e9:.3g} GB are in the cache; lower it, or set HF_ASSETS_CACHE to "
            "a folder on a larger disk"
        )
    return HubStore(found, cache, allow_missing=allow_missing)


def cache_root() -> Path:
    """Where the client keeps what other programs cache: below HF_ASSETS_CACHE, or HF_HOME."""
    return cached_assets_path("peagle", "hub", "stores")


def cache_name(address: HubAddress) -> str:
    """Of a store's folder in the cache."""
    parts = (*address.repo.split("/"), *address.path.split("/"), address.revision)
    return "--".join(part for part in parts if part)


def fetch_small_files(address: HubAddress, files: dict[str, RemoteFile]) -> Path:
    """Bring everything but the shards into the cache, each file as the Hub lists it.

    Returns its folder. Whoever finds all in order there waits for nobody.
    """
    for kind in ("http_get", "xet_get"):  # a bar per shard would drown that of training
        disable_progress_bars(f"huggingface_hub.{kind}")
    root = cache_root() / "small" / cache_name(address)
    folder = root / address.path

    def differing(names: Iterable[str]) -> list[str]:
        return [name for name in names if content_problem(folder / name, files[name])]

    wanted = differing(name for name in files if name in REQUIRED or INDEX_FILE.fullmatch(name))
    if wanted:
        with locked(root.with_name(root.name + ".lock")):
            for leftover in root.glob(".cache/huggingface/download/**/*.incomplete"):
                leftover.unlink()
            with ThreadPoolExecutor(PARALLEL_DOWNLOADS) as pool:
                still = differing(wanted)  # another process may have fetched some meanwhile
                list(pool.map(lambda name: fetch_file(address, name, files[name], root), still))
    return folder
