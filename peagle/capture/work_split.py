"""Which prompts are answered together, and which process does what.

Prompts are answered in batches, which depend on the prompts alone. Process ``i`` of ``n`` takes
every ``n``-th batch, has shards of its own numbers, and leaves a mark when it is done. Each sample
knows its place among all, so the finished store is the same, whoever captured what.
"""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TypeVar

from peagle.capture.config import CaptureConfig
from peagle.capture.prompts import Prompt
from peagle.store.index import SHARDS_PER_PROCESS
from peagle.store.locks import locked
from peagle.store.manifest import Manifest
from peagle.target.target import TargetSource

Item = TypeVar("Item")


class PromptBatch(NamedTuple):
    """Prompts that are answered together: their answers depend on each other's lengths, and draws.

    Which prompts make a batch follows from the prompts alone, so that a resumed capture, or one by
    several processes, answers as an uninterrupted one does.
    """

    greedy: bool
    prompts: list[Prompt]


def unique_prompts(prompts: list[Prompt], config: CaptureConfig) -> list[Prompt]:
    """Leave out prompts that would only repeat the conversation of another one."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        repeats = not config.regenerate or config.is_greedy(prompt.id)
        content = prompt.content[1:4] if config.regenerate else prompt.content[1:]
        found.setdefault(json.dumps(content, default=str) if repeats else prompt.id, prompt)
    return list(found.values())


def make_batches(prompts: list[Prompt], config: CaptureConfig) -> list[PromptBatch]:
    """The greedy ones first."""
    batches = []
    for greedy in (True, False):
        group = [prompt for prompt in prompts if config.is_greedy(prompt.id) == greedy]
        for start in range(0, len(group), config.batch_size):
            batches.append(PromptBatch(greedy, group[start : start + config.batch_size]))
    return batches


class WorkSplit(NamedTuple):
    """The share of one of ``count`` processes that capture into one folder."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str | None) -> "WorkSplit":
        """``1/4`` is the second of four; ``None`` all there is. Raises ``ValueError``."""
        found = re.fullmatch(r"(\d+)/(\d+)", "0/1" if text is None else text)
        split = cls(*map(int, found.groups())) if found else None
        if split is None or split.index >= split.count:
            raise ValueError(f"part must be I/N with I from 0 to N - 1 (0/2, 1/2), got {text!r}")
        return split

    def share(self, items: Sequence[Item]) -> list[Item]:
        return list(items[self.index :: self.count])

    def own_file(self, name: str) -> str:
        """A file name that no other process of the same folder writes to."""
        stem, dot, suffix = name.partition(".")
        return name if self.index == 0 else f"{stem}-{self.index}{dot}{suffix}"

    @property
    def first_shard(self) -> int:
        return self.index * SHARDS_PER_PROCESS

    def mark_done(self, folder: Path, batch_size: int) -> bool:
        """Note that this share is done; true when it was the last one.

        With another batch size the work is split otherwise: such shares complete nothing.
        """
        marks = [folder / f"done-{i}-of-{self.count}-by-{batch_size}" for i in range(self.count)]
        marks[self.index].touch()
        return all(mark.exists() for mark in marks)

    @contextmanager
    def lock(self, folder: Path) -> Iterator[None]:
        """Raise ``ValueError`` while another process captures the same share, or all of them.

        Shares go together in the folder; a whole capture needs it for itself.
        """
        with ExitStack() as stack:
            try:
                shared = self.count > 1
                stack.enter_context(locked(folder / "parts.lock", wait=False, shared=shared))
                stack.enter_context(locked(folder / f"part-{self.index}.lock", wait=False))
            except BlockingIOError as error:
                raise ValueError(
                    f"another process is capturing into {folder.parent}: wait for it, or give each "
                    "a part of its own (--capture.part 0/2, 1/2)"
                ) from error
            yield


class Share(NamedTuple):
    """What one process does of a capture."""

    target: TargetSource
    manifest: Manifest
    config: CaptureConfig
    folder: Path  # of the store
    split: WorkSplit
    prompts: list[Prompt]  # those of all processes, in the order of the store

    @property
    def batches(self) -> list[PromptBatch]:
        """Of this process's prompts."""
        return self.split.share(make_batches(self.prompts, self.config))

    @property
    def answers_path(self) -> Path:
        return self.folder / self.split.own_file("answers.jsonl")
