"""Several processes make one store: who does what, and when all is done.

Prompts are answered in units, which depend on the prompts alone. Part ``i`` of ``n`` takes every
``n``-th unit, has shards of its own numbers, and leaves a mark when it is done. Each sample knows
its place among all, so the finished store is the same, whoever captured what.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from peagle.store.index import SHARDS_PER_PART
from peagle.store.locks import locked

Unit = TypeVar("Unit")


class Part(NamedTuple):
    """One of ``count`` processes that capture into one folder."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> "Part":
        """``1/4`` is the second of four; ``None`` all there is."""
        found = re.fullmatch(r"(\d+)/(\d+)", "0/1" if text is None else text)
        part = cls(*map(int, found.groups())) if found else None
        if part is None or part.index >= part.count:
            raise ValueError(f"part must be I/N with I from 0 to N - 1 (0/2, 1/2), got {text!r}")
        return part

    def of(self, units: Sequence[Unit]) -> list[Unit]:
        return list(units[self.index :: self.count])

    def own_name(self, name: str) -> str:
        """A file name that no other part of the same folder writes to."""
        stem, dot, suffix = name.partition(".")
        return name if self.index == 0 else f"{stem}-{self.index}{dot}{suffix}"

    @property
    def first_shard(self) -> int:
        return self.index * SHARDS_PER_PART

    def mark(self, folder: Path, batch_size: int) -> bool:
        """Note that this part is done; true when it was the last one.

        Parts of other batches were cut otherwise: with them nothing is complete.
        """
        marks = [folder / f"done-{i}-of-{self.count}-by-{batch_size}" for i in range(self.count)]
        marks[self.index].touch()
        return all(mark.exists() for mark in marks)


@contextmanager
def alone(folder: Path, part: Part) -> Iterator[None]:
    """Raise ``ValueError`` while another process captures the same part, or all of them.

    Parts share the folder; a whole capture needs it for itself.
    """
    with ExitStack() as stack:
        try:
            shared = part.count > 1
            stack.enter_context(locked(folder / "parts.lock", wait=False, shared=shared))
            stack.enter_context(locked(folder / f"part-{part.index}.lock", wait=False))
        except BlockingIOError as error:
            raise ValueError(
                f"another process is capturing into {folder.parent}: wait for it, or give each "
                "a part of its own (--capture.part 0/2, 1/2)"
            ) from error
        yield
