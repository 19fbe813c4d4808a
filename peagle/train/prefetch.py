"""Reads in threads, ahead of whoever iterates; the order is that of the items."""

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class ReadAhead:
    """``read`` of every item, in order; each of ``threads`` works on one of the next items.

    Threads instead of a DataLoader's processes: waiting for the disk, copying and hashing release
    the interpreter's lock, and what a process has read must be copied to shared memory, which
    costs more than reading it. Without threads, an item is read when it is asked for.
    """

    def __init__(self, read: Callable[[Any], Any], items: Any, *, threads: int):
        self.read, self.items, self.threads = read, items, threads

    def __len__(self) -> int:
        return len(self.items)

    def __iter__(self) -> Iterator[Any]:
        items = iter(self.items)  # now, not at the first item: it knows how far training is
        return self.ahead(items) if self.threads else map(self.read, items)

    def ahead(self, items: Iterator[Any]) -> Iterator[Any]:
        pool = ThreadPoolExecutor(self.threads, "read-ahead")
        futures = deque()
        try:
            for item in items:
                futures.append(pool.submit(self.read, item))
                if len(futures) > self.threads:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
