"""Writing a store, shard by shard.

A shard is written to a temporary file, synced and renamed, and then its index part likewise. A
shard without its index part does not exist, so a killed writer loses at most one shard.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from peagle.store.disk import publish
from peagle.store.index import (
    SHARDS_PER_PART,
    Entry,
    index_parts,
    number_of_shard,
    read_index,
    write_index,
)
from peagle.store.sample import TENSORS, Sample, digest


class StoreWriter:
    """Appends samples to a store; ``done`` holds those that earlier runs completed.

    With the ``identity`` of its manifest in every index part, a shard cannot be mistaken for one
    of another store. Processes that write at the same time begin at shards far from each other.
    """

    def __init__(
        self,
        folder: Path,
        *,
        shard_bytes: int,
        identity: str | None = None,
        first_shard: int = 0,
    ):
        self.folder, self.shard_bytes, self.identity = folder, shard_bytes, identity
        folder.mkdir(parents=True, exist_ok=True)
        mine = range(first_shard, first_shard + SHARDS_PER_PART)
        for leftover in folder.glob("shard-*.tmp"):
            if number_of_shard(leftover) in mine:
                leftover.unlink()
        parts = index_parts(folder)
        self.done = [entry for part in parts for entry in read_index(part, identity)]
        self.next_shard = first_shard + sum(number_of_shard(part) in mine for part in parts)
        self.pending: list[tuple[str, str, Sample, int]] = []
        self.bytes = 0
        self.next_place = max((entry.place for entry in self.done), default=-1) + 1

    def append(self, sample_id: str, split: str, sample: Sample, place: int | None = None) -> None:
        """``place`` is the sample's in the store's order; default after all before it.

        Raises ``ValueError`` for a sample whose hidden states are not finite.
        """
        if not all(torch.isfinite(t).all() for t in (sample.aux, sample.final)):
            raise ValueError(f"sample {sample_id}: the target's hidden states are not finite")
        place = self.next_place if place is None else place
        self.next_place = max(self.next_place, place + 1)
        self.pending.append((sample_id, split, sample, place))
        self.bytes += sum(t.nbytes for t in sample)
        if self.bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the pending samples as one shard and its index part."""
        if not self.pending:
            return
        name = f"shard-{self.next_shard:05d}"
        tensors, entries = {}, []
        for slot, (sample_id, split, sample, place) in enumerate(self.pending):
            contents = [tensor.contiguous() for tensor in sample]
            tensors |= {f"{slot}.{key}": t for key, t in zip(TENSORS, contents, strict=True)}
            hashes = tuple(digest(t) for t in contents)
            entries.append(
                Entry(
                    sample_id,
                    f"{name}.safetensors",
                    slot,
                    len(sample.input_ids),
                    int(sample.loss_mask.sum()),
                    split,
                    hashes,
                    place,
                )
            )
        temporary = self.folder / f"{name}.safetensors.tmp"
        save_file(tensors, temporary)
        publish(temporary, self.folder / f"{name}.safetensors")
        write_index(self.folder, name, entries, self.identity)
        self.pending, self.bytes = [], 0
        self.next_shard += 1
