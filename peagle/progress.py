"""How far a long stage is: a bar on terminals, a line now and then where nobody watches."""

import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from tqdm import tqdm

LINE_EVERY_S = 30.0
TELLING = 0.02  # share of the whole after which the time that is left can be guessed
Item = TypeVar("Item")


class Lines:
    """Prints ``WHAT: DONE/TOTAL (SHARE), RATE, TIME left`` to stderr, at most every half minute.

    Args:
        what: the stage.
        total: units of the whole stage; None if nobody knows.
        done: units that an earlier start has done.
        unit: what is counted.
    """

    def __init__(self, what: str, total: int | None, *, done: int = 0, unit: str = "it"):
        self.what, self.total, self.done, self.unit = what, total, done, unit
        self.first = done
        self.started = self.printed = time.monotonic()

    def is_due(self) -> bool:
        return time.monotonic() - self.printed >= LINE_EVERY_S

    def update(self, count: int = 1) -> None:
        """Also print a last line, unless the stage was over before a line was due."""
        self.done += count
        long = time.monotonic() - self.started >= LINE_EVERY_S
        if self.is_due() or (long and self.done == self.total):
            self.show()

    def show(self, *figures: str) -> None:
        """Print the line, with what is measured on the way in its middle."""
        self.printed = time.monotonic()
        seconds = self.printed - self.started
        rate = (self.done - self.first) / max(seconds, 1e-9)
        of = f"/{self.total} ({self.done / max(self.total, 1):.0%})" if self.total else ""
        words = [f"{self.what}: {self.done}{of}", *figures]
        if not figures:
            words.append(f"{tqdm.format_sizeof(rate)} {self.unit}/s")
        if self.total == self.done:
            words.append(f"took {tqdm.format_interval(seconds)}")
        elif self.total and self.done - self.first >= TELLING * self.total:
            left = tqdm.format_interval((self.total - self.done) / rate)
            words.append(f"{left} left")
        print(", ".join(words), file=sys.stderr, flush=True)


def progress(
    what: str, total: int, *, done: int = 0, unit: str = "it"
) -> AbstractContextManager["tqdm | Lines"]:
    """What to ``update`` as a stage goes on."""
    if sys.stderr.isatty():
        return tqdm(total=total, initial=done, desc=what, unit=unit)
    return nullcontext(Lines(what, total, done=done, unit=unit))


def track(
    what: str,
    items: Iterable[Item],
    total: int | None = None,
    *,
    unit: str = "it",
    shown: bool = True,
) -> Iterator[Item]:
    """The items, of which ``progress`` counts each that is done; default total: all there are.

    Not ``shown`` where another process goes through the same items.
    """
    if not shown:
        yield from items
        return
    with progress(what, len(items) if total is None else total, unit=unit) as bar:
        for item in items:
            yield item
            bar.update()
