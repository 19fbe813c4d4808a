"""Fetches the shards of the packs that come next, as far ahead as the cache holds them."""

import math
import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from queue import SimpleQueue

from peagle.store.shard_cache import ShardCache
from peagle.train.sampler import Pack

Needs = Callable[[Pack], list[str]]  # the shards of a pack


class FetchAhead:
    """The same packs in the same order; meanwhile threads fetch what they will need.

    The threads are daemons, and what they could not fetch is no matter of theirs: whoever reads the
    pack asks again, and says what went wrong in its turn.

    Args:
        lag: packs that are still being read when a further one is asked for.
    """

    def __init__(
        self, packs: Iterable[Pack], needs: Needs, shards: ShardCache, *, threads: int, lag: int
    ):
        self.packs, self.needs, self.shards = packs, needs, shards
        self.threads, self.lag = threads, lag

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self) -> Iterator[Pack]:
        return self.ahead(list(self.packs))  # now: it knows how far training is

    def ahead(self, packs: list[Pack]) -> Iterator[Pack]:
        room = self.shards.limit - max(self.shards.sizes.values())
        window = Window([self.needs(pack) for pack in packs], self.shards.sizes, room)
        coming: SimpleQueue[str | None] = SimpleQueue()
        stop = threading.Event()
        for _ in range(self.threads):
            arguments = (coming, window.held, stop)
            threading.Thread(target=self.fetch, args=arguments, daemon=True).start()
        try:
            for number, pack in enumerate(packs):
                self.shards.release(window.leave(number - self.lag))
                for shard in window.extend(number):
                    coming.put(shard)
                yield pack
        finally:
            stop.set()
            for _ in range(self.threads):
                coming.put(None)

    def fetch(
        self, coming: "SimpleQueue[str | None]", needed: Mapping[str, int], stop: threading.Event
    ) -> None:
        while (shard := coming.get()) is not None and not stop.is_set():
            if shard in needed:  # else its reader was faster, and it has been read
                with suppress(ValueError, OSError):
                    self.shards.open(shard).close()


class Window:
    """The packs from those being read to the last whose shards fit into ``room`` beside theirs."""

    def __init__(self, needs: list[list[str]], sizes: dict[str, int], room: int):
        self.needs, self.sizes, self.room = needs, sizes, room
        self.begin = self.end = 0
        self.held: Counter[str] = Counter()  # packs of the window that need a shard

    def leave(self, begin: int) -> list[str]:
        """Begin with a later pack; returns the shards that no pack of the window needs now."""
        gone = []
        for need in self.needs[self.begin : max(begin, self.begin)]:
            for shard in need:
                self.held[shard] -= 1
                if not self.held[shard]:
                    del self.held[shard]
                    gone.append(shard)
        self.begin = max(begin, self.begin)
        return gone

    def extend(self, number: int) -> list[str]:
        """Go as far ahead as there is room, but to pack ``number`` at least; returns new shards."""
        new: list[str] = []
        used = sum(self.sizes.get(shard, 0) for shard in self.held)
        while self.end < len(self.needs):
            more = [shard for shard in self.needs[self.end] if shard not in self.held]
            used += sum(self.sizes.get(shard, 0) for shard in more)
            if used > self.room and self.end > number:
                break
            self.held.update(self.needs[self.end])
            self.end += 1
            new += more
        return new


def bytes_to_fetch(needs: Iterable[list[str]], sizes: dict[str, int], limit: int) -> int:
    """Fetched into an empty cache that drops the longest unused, while packs are read in order."""
    held: OrderedDict[str, int] = OrderedDict()
    fetched = used = 0
    for shard in (shard for need in needs for shard in need):
        if shard not in held:
            held[shard] = sizes.get(shard, 0)
            fetched += held[shard]
            used += held[shard]
        held.move_to_end(shard)
        while used > limit:
            used -= held.popitem(last=False)[1]
    return fetched


def traffic(
    what: str, needs: Iterable[list[str]], cache: ShardCache, *, blocks: int | None = None
) -> str:
    """How much an order fetches, and what would help if it is more than the store.

    Args:
        blocks: shards whose samples the order takes together; none where it knows no blocks.
    """
    total = sum(cache.sizes.values())
    fetched = bytes_to_fetch(needs, cache.sizes, cache.limit)
    advice = ""
    if fetched > 1.5 * total:
        enough = math.ceil(total / 1e7) / 100
        advice = f": with data.cache_gb {enough:g}"
        half = max(1, cache.limit // 2 // max(cache.sizes.values()))  # the next block comes beside
        if blocks is not None and half < blocks:
            advice += f", or with data.block_shards {half},"
        advice += " it is less"
    return (
        f"{what} fetches about {fetched / 1e9:.3g} GB where nothing is cached; the store has "
        f"{total / 1e9:.3g} GB, the cache {cache.limit / 1e9:.3g}{advice}"
    )
