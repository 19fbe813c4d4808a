"""Writing a store, shard by shard.

A shard is written to a temporary file, synced and renamed, and then its index file likewise. A
shard without its index file does not exist, so a killed writer loses at most one shard.
"""

from pathlib import Path

import torch
from safetensors.torch import save_file

from peagle.store.disk import rename_durably
from peagle.store.index import (
    SHARDS_PER_PROCESS,
    Entry,
    index_files,
    read_index,
    shard_number,
    unfinished_files,
    write_index,
)
from peagle.store.sample import TENSORS, Sample, digest


class StoreWriter:
    """Appends samples to a store; ``done`` holds those that earlier runs completed.

    With the ``identity`` of its manifest in every index file, a shard cannot be mistaken for one
    of another store. Processes that write at the same time begin at shards far from each other.
    """

    def __init__(
        self, folder: Path, *, shard_bytes: int, identity: str | None = None, first_shard: int = 0
    ):
        self.folder, self.shard_bytes, self.identity = folder, shard_bytes, identity
        folder.mkdir(parents=True, exist_ok=True)
        mine = range(first_shard, first_shard + SHARDS_PER_PROCESS)
        for leftover in unfinished_files(folder):
            if shard_number(leftover) in mine:
                leftover.unlink()
        files = index_files(folder)
        self.done = [entry for path in files for entry in read_index(path, identity)]
        self.next_shard = first_shard + sum(shard_number(path) in mine for path in files)
        self.pending: list[tuple[Entry, Sample]] = []
        self.bytes = 0
        self.next_place = max((entry.place for entry in self.done), default=-1) + 1

    def append(self, sample_id: str, split: str, sample: Sample, place: int | None = None) -> None:
        """``place`` is the sample's in the store's order; default after all before it.

        Raises ``ValueError`` for a sample whose hidden states are not finite.
        """
        if not all(torch.isfinite(t).all() for t in (sample.aux, sample.final)):
            raise ValueError(f"sample {sample_id}: the target's hidden states are not finite")
        sample = Sample(*(tensor.contiguous() for tensor in sample))
        entry = Entry(
            sample=sample_id,
            shard=f"shard-{self.next_shard:05d}.safetensors",
            slot=len(self.pending),
            tokens=len(sample.input_ids),
            supervised=int(sample.loss_mask.sum()),
            split=split,
            hashes=tuple(map(digest, sample)),
            place=self.next_place if place is None else place,
        )
        self.next_place = max(self.next_place, entry.place + 1)
        self.pending.append((entry, sample))
        self.bytes += sum(tensor.nbytes for tensor in sample)
        if self.bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the pending samples as one shard and its index file."""
        if not self.pending:
            return
        tensors = {
            f"{entry.slot}.{key}": tensor
            for entry, sample in self.pending
            for key, tensor in zip(TENSORS, sample, strict=True)
        }
        entries = [entry for entry, _ in self.pending]
        path = self.folder / entries[0].shard
        temporary = path.with_name(f"{path.name}.tmp")
        save_file(tensors, temporary)
        rename_durably(temporary, path)
        write_index(self.folder, path.stem, entries, self.identity)
        self.pending, self.bytes = [], 0
        self.next_shard += 1
