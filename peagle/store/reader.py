"""The hidden-state store: safetensors shards, a Parquet index beside them, and an identity.

    store/manifest.json          whose hidden states these are
    store/target.safetensors     the target's embedding, final norm and head
    store/target_layers.safetensors   some of its layers, for a drafter to start from
    store/shard-00000.safetensors, shard-00000.parquet, ...

Here it is read; ``writer.py`` writes it.
"""

from collections import Counter
from functools import lru_cache
from io import FileIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import BFloat16
from torch import Tensor

from peagle.store.errors import BadSample, StoreError
from peagle.store.index import Entry, index_files, read_index, sort_and_deduplicate
from peagle.store.manifest import Manifest
from peagle.store.sample import TENSORS, Sample
from peagle.store.shard import Span, read_into, read_spans

HEADERS = 256  # of shards that a store keeps in memory


class Shards:
    """Where a store's shards are: in its own folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def has(self, shard: str) -> bool:
        return (self.folder / shard).exists()

    def open(self, shard: str) -> FileIO:
        return open(self.folder / shard, "rb", buffering=0)


class Store:
    """Reads samples by number; a sample is verified whenever it is read.

    Args:
        folder: of everything but, perhaps, the shards.
        shards: where those are; default in the folder too.

    Raises:
        ValueError: if manifest or index are not in order, or a shard is missing. With
            ``allow_missing``, reading the samples of a missing shard raises ``BadSample`` instead.
    """

    def __init__(self, folder: Path, *, allow_missing: bool = False, shards: Shards | None = None):
        self.folder, self.shards = folder, shards or Shards(folder)
        self.manifest = Manifest.read(folder)
        found: list[Entry] = []
        for path in index_files(folder):
            shard = path.with_suffix(".safetensors")
            entries = read_index(path, self.manifest.identity())
            for name in {entry.shard for entry in entries}:
                if name != shard.name or shard.is_symlink() or path.is_symlink():
                    raise ValueError(f"{path.name} names {name!r}, not a file of this store")
            if not self.shards.has(shard.name) and not allow_missing:
                raise StoreError(folder, f"shard {shard.name} is missing")
            found += entries
        self.entries = sort_and_deduplicate(found)
        self.refetched: Counter[str] = Counter()  # a shard; a header is read anew for each copy
        self.headers = lru_cache(HEADERS)(lambda shard, refetched: self.read_spans(shard))

    def __len__(self) -> int:
        return len(self.entries)

    def read_spans(self, shard: str) -> dict[str, Span]:
        with self.shards.open(shard) as file:
            return read_spans(file)

    def split(self, name: str) -> list[int]:
        """Numbers of the samples of a split."""
        return [i for i, entry in enumerate(self.entries) if entry.split == name]

    def token_ids(self, index: int) -> Tensor:
        """A sample's ids alone, not verified; [n]. Raises ``BadSample`` if it cannot be read."""
        entry = self.entries[index]
        try:
            with self.shards.open(entry.shard) as file:
                header = self.headers(entry.shard, self.refetched[entry.shard])
                ids = torch.empty(entry.tokens, dtype=torch.long)
                read_into(ids, file, header[f"{entry.slot}.{TENSORS[0]}"])
        except (OSError, KeyError) as error:
            raise bad_sample(entry, f"cannot be read ({error})") from error
        return ids

    def read(self, index: int, states: tuple[Tensor, Tensor] | None = None) -> Sample:
        """One sample, verified; ``states`` is where ``aux`` and ``final`` go, else new memory.

        Raises:
            BadSample: naming shard and sample when the stored bytes are not right.
        """
        entry = self.entries[index]
        try:
            with self.shards.open(entry.shard) as file:
                header = self.headers(entry.shard, self.refetched[entry.shard])
                spans = [header[f"{entry.slot}.{key}"] for key in TENSORS]
                check_shapes(spans, entry, self.manifest)
                places = states or [torch.empty(s.shape, dtype=torch.bfloat16) for s in spans[2:]]
                sample = Sample(
                    torch.empty(entry.tokens, dtype=torch.long),
                    torch.empty(entry.tokens, dtype=torch.bool),
                    *places,
                )
                hashes = [read_into(t, file, s) for t, s in zip(sample, spans, strict=True)]
        except (OSError, KeyError) as error:
            raise bad_sample(entry, f"cannot be read ({error})") from error
        check_contents(sample, hashes, entry, self.manifest)
        return sample


def bad_sample(entry: Entry, problem: str) -> BadSample:
    return BadSample(f"shard {entry.shard}, sample {entry.sample}", problem)


def check_shapes(spans: list[Span], entry: Entry, manifest: Manifest) -> None:
    """Raise ``BadSample`` unless the stored tensors fit index and manifest."""
    tokens, hidden = entry.tokens, manifest.hidden_size
    wanted = (
        ("I64", (tokens,)),
        ("BOOL", (tokens,)),
        ("BF16", (tokens, len(manifest.layer_ids) * hidden)),
        ("BF16", (tokens, hidden)),
    )
    for key, span, (dtype, shape) in zip(TENSORS, spans, wanted, strict=True):
        if (span.dtype, span.shape) != (dtype, shape):
            raise bad_sample(entry, f"{key} is {span.shape} {span.dtype}, not {shape} {dtype}")


def check_contents(sample: Sample, hashes: list[str], entry: Entry, manifest: Manifest) -> None:
    """Raise ``BadSample`` unless the tensors are the captured ones and can be trained on."""
    for key, found, written in zip(TENSORS, hashes, entry.hashes, strict=True):
        if found != written:
            raise bad_sample(entry, f"{key} is corrupt (its hash differs)")
    if not (all_finite(sample.aux) and all_finite(sample.final)):
        raise bad_sample(entry, "its hidden states are not finite")
    low, high = sample.input_ids.aminmax()
    if low < 0 or high >= manifest.vocab_size:
        raise bad_sample(
            entry, f"token ids reach {low}..{high} of a vocabulary of {manifest.vocab_size}"
        )


def all_finite(states: BFloat16[Tensor, "n D"]) -> bool:
    """Whether all bits stay below those of an infinity, for either sign.

    By numpy: torch would start threads of its own in every thread that reads.
    """
    bits = states.view(torch.uint16).numpy()
    return int(bits.max()) < 0xFF80 and int(bits.view(np.int16).max()) < 0x7F80
