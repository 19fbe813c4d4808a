"""A shard cache over a source that counts what is fetched."""

import os
import time
from contextlib import suppress
from pathlib import Path

from peagle.store.locks import locked
from peagle.store.shard_cache import ShardCache

SIZES = {f"shard-{n:05d}.safetensors": 1000 for n in range(8)}


NAMES = sorted(SIZES)


def of_size(name: str) -> bytes:
    return (name.encode() * 40)[:1000].ljust(1000, b".")  # a name has 23 letters


class Source:
    """Where the shards are fetched from: what was asked, and how much lay in the cache then."""

    def __init__(self, root: Path, delay: float = 0.0):
        self.root, self.delay = root, delay
        self.asked: list[str] = []
        self.most = 0

    def __call__(self, name: str, folder: Path) -> Path:
        self.asked.append(name)
        path = folder / name
        path.write_bytes(of_size(name)[:500])
        time.sleep(self.delay)
        path.write_bytes(of_size(name))
        with locked(self.root / "locks" / "all"):  # what moves meanwhile would be counted twice
            self.most = max(self.most, held(self.root))
        return path


def held(root: Path) -> int:
    """Bytes of copies and arrivals; what is being fetched may vanish meanwhile."""
    total = 0
    for kind in ("shards", "arriving"):
        for folder, _, names in os.walk(root / kind):
            for name in (name for name in names if name.startswith("shard-")):
                with suppress(FileNotFoundError):
                    total += os.stat(os.path.join(folder, name)).st_size
    return total


def make_cache(root, *, shards: int, source=None, store: str = "a--b--c") -> ShardCache:
    fetch = source or Source(root)
    return ShardCache(root, store, dict(SIZES), limit=shards * 1000, fetch=fetch)


def read(cache: ShardCache, name: str) -> bytes:
    with cache.open(name) as file:
        return file.read()
