"""A bounded folder of copies of shards that lie elsewhere, shared by the processes of a machine.

    cache/shards/STORE/shard-00000.safetensors   modified when last used; long ago: to go first
    cache/arriving/STORE--shard-00000/           one that is being fetched, and the room it takes
    cache/locks/                                 who fetches what; a killed process holds nothing

A copy appears by rename, whole and checked. It may be removed while somebody reads it: an open file
keeps its contents until it is closed, and who comes later fetches it again.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path

from peagle.store.locks import locked
from peagle.store.reader import Shards

POLL_S = 0.05  # seconds between looks for room that others' arrivals take


class FetchError(ValueError):
    """Something of a store could not be fetched. No damage: no sample is left out for it."""


class ShardCache(Shards):
    """Shards by name, fetched when they are asked for and not there.

    Args:
        root: of all stores' copies.
        store: name of this store in the cache; another content must have another name.
        sizes: of the shards in bytes.
        limit: bytes that all copies may take, those that are arriving included.
        fetch: brings a shard into a folder, whole and checked, and returns its path.
    """

    def __init__(
        self,
        root: Path,
        store: str,
        sizes: dict[str, int],
        *,
        limit: int,
        fetch: Callable[[str, Path], Path],
    ):
        super().__init__(root / "shards" / store)
        self.root, self.store, self.sizes, self.limit = root, store, sizes, limit
        self.fetch = fetch
        for folder in (self.folder, root / "arriving"):
            folder.mkdir(parents=True, exist_ok=True)
        refuse_without_locks(root / "locks" / "probe")
        with locked(root / "locks" / "all"):
            self.arriving_bytes()

    def has(self, shard: str) -> bool:
        """Whether it can be had."""
        return shard in self.sizes

    def open(self, shard: str) -> FileIO:
        """The copy, from now on the last to be removed; fetched if need be.

        Raises:
            FileNotFoundError: if the store has no such shard.
            FetchError: if it cannot be fetched or kept.
        """
        if shard not in self.sizes:
            raise FileNotFoundError(f"{shard} is not where the store is")
        with self.as_fetch_error(shard):
            return self.open_copy(shard) or self.fetch_and_open(shard)

    def open_copy(self, shard: str) -> FileIO | None:
        """The copy if it is there; one that a crash of the machine has cut is not."""
        try:
            file = super().open(shard)
        except FileNotFoundError:
            return None
        if os.fstat(file.fileno()).st_size != self.sizes[shard]:
            file.close()
            return None
        os.utime(file.fileno())
        return file

    def fetch_and_open(self, shard: str) -> FileIO:
        """The shard by way of the network, unless another process brings it meanwhile."""
        with locked(self.lock_of(f"{self.store}--{shard}")):
            file = self.open_copy(shard)
            if file is not None:
                return file
            arriving = self.reserve(shard)
            try:
                path = self.fetch(shard, arriving)
                file = open(path, "rb", buffering=0)  # before it can be removed
                os.utime(file.fileno())
                with locked(self.root / "locks" / "all"):  # it counts once, as the one or the other
                    os.replace(path, self.folder / shard)
                    (arriving / "bytes").unlink()
            finally:
                shutil.rmtree(arriving, ignore_errors=True)
            return file

    def drop(self, shard: str) -> None:
        """Raises ``FetchError`` where the disk does not allow it."""
        with self.as_fetch_error(shard), locked(self.root / "locks" / "all"):
            (self.folder / shard).unlink(missing_ok=True)

    @contextmanager
    def as_fetch_error(self, shard: str) -> Iterator[None]:
        """A full disk or too many open files say nothing of the samples in a shard."""
        try:
            yield
        except OSError as error:
            raise FetchError(
                f"{shard} cannot be fetched into {self.root} or opened there: {error}"
            ) from error

    def used_bytes(self) -> int:
        """Bytes of all copies."""
        with locked(self.root / "locks" / "all"):
            return sum(path.stat().st_size for path in self.root.glob("shards/*/*"))

    def release(self, shards: Iterable[str]) -> None:
        """Let these, which are not needed for now, be removed before any other."""
        for shard in shards:
            with suppress(FileNotFoundError):
                os.utime(self.folder / shard, (0, 0))

    def reserve(self, shard: str) -> Path:
        """A folder to fetch into; waits while others' arrivals leave no room."""
        arriving = self.root / "arriving" / f"{self.store}--{shard}"
        shutil.rmtree(arriving, ignore_errors=True)  # of a killed process: this one has the lock
        while True:
            with locked(self.root / "locks" / "all"):
                if self.make_room(self.sizes[shard]):
                    arriving.mkdir()
                    (arriving / "bytes").write_text(str(self.sizes[shard]))
                    return arriving
            time.sleep(POLL_S)

    def make_room(self, size: int) -> bool:
        """Remove copies, the longest unused first, until ``size`` more bytes fit.

        Copies come and go under the lock of all, which the caller holds.
        """
        copies = [(path.stat(), path) for path in self.root.glob("shards/*/*")]
        used = self.arriving_bytes() + sum(stat.st_size for stat, _ in copies)
        for stat, path in sorted(copies, key=lambda copy: copy[0].st_mtime_ns):
            if used + size <= self.limit:
                break
            path.unlink(missing_ok=True)
            used -= stat.st_size
        return used + size <= self.limit

    def arriving_bytes(self) -> int:
        """Bytes reserved by living processes; what killed ones left is removed."""
        taken = 0
        for folder in list((self.root / "arriving").iterdir()):
            try:
                with locked(self.lock_of(folder.name), wait=False):
                    shutil.rmtree(folder, ignore_errors=True)
            except BlockingIOError:
                with suppress(FileNotFoundError):  # it has just arrived
                    taken += int((folder / "bytes").read_text())
        return taken

    def lock_of(self, name: str) -> Path:
        return self.root / "locks" / name


def refuse_without_locks(path: Path) -> None:
    """Raise ``ValueError`` where the file system has no locks, or only says it had."""
    with locked(path):
        try:
            with locked(path, wait=False):
                pass
        except BlockingIOError:
            return
    raise ValueError(
        f"{path.parent.parent} is on a file system without locks: set HF_ASSETS_CACHE to a folder "
        "on a local disk"
    )
