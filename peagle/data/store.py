"""The hidden-state store: safetensors shards, a Parquet index beside them, and an identity.

    store/manifest.json          whose hidden states these are
    store/target.safetensors     the target's embedding, final norm and head
    store/shard-00000.safetensors, shard-00000.parquet, ...

A shard is written to a temporary file, synced and renamed, and then its index part likewise. A
shard without its index part does not exist, so a killed writer loses at most one shard.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

FORMAT = 1
TENSORS = ("input_ids", "loss_mask", "aux", "final")


class Sample(NamedTuple):
    """One document as captured; all of the same length ``n``."""

    input_ids: Int[Tensor, " n"]
    loss_mask: Bool[Tensor, " n"]  # tokens of the assistant
    aux: Float[Tensor, "n AD"]  # captured layers side by side, ascending
    final: Float[Tensor, "n T"]  # output of the last layer, before the final norm


@dataclass(frozen=True)
class Manifest:
    """The identity of a store. Training on another target's states is an error, not a warning."""

    target: str
    revision: str | None
    fingerprint: str  # of the target's weights
    layer_ids: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    num_layers: int
    dtype: str
    tokenizer: str  # hash of vocabulary and chat template
    rms_norm_eps: float
    softcap: float | None
    block: dict[str, Any]  # shape of the target's layers; a drafter starts from it
    answers: str  # hash of prompts and how their answers were made
    format: int = FORMAT

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises ``ValueError`` when there is no complete store in the folder."""
        path = folder / "manifest.json"
        if not path.exists():
            raise ValueError(f"no store at {folder}: run `python -m peagle capture` first")
        found = json.loads(path.read_text())
        known = {field.name for field in fields(cls)}
        if found.get("format") != FORMAT or set(found) != known:
            raise ValueError(f"{path} is not a manifest of format {FORMAT}: capture again")
        return cls(**{**found, "layer_ids": tuple(found["layer_ids"])})

    def write(self, folder: Path) -> None:
        write_atomically(folder / "manifest.json", json.dumps(asdict(self), indent=2).encode())

    def check(self, wanted: "Manifest") -> None:
        """Raise ``ValueError`` naming the first field in which the store differs from the run.

        ``target`` is only a name: the same weights in another folder are the same target.
        """
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(wanted, field.name)
            if ours != theirs and field.name != "target":
                raise ValueError(
                    f"the store was captured with {field.name} = {ours!r}, but this run needs "
                    f"{theirs!r}: use another store folder, or remove this one to capture again"
                )


class Entry(NamedTuple):
    """One line of the index."""

    sample: str  # hash of the conversation
    shard: str  # file name of the shard, without folder
    slot: int  # number of the sample within its shard
    tokens: int
    supervised: int
    split: str  # "train" or "val"
    hashes: tuple[str, ...]  # xxh3 of each tensor, in the order of TENSORS


class StoreWriter:
    """Appends samples to a store; ``done`` holds the samples that earlier runs completed."""

    def __init__(self, folder: Path, *, shard_bytes: int):
        self.folder, self.shard_bytes = folder, shard_bytes
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("*.tmp"):
            leftover.unlink()
        parts = sorted(folder.glob("shard-*.parquet"))
        self.done = {entry.sample for part in parts for entry in read_index(part)}
        self.next_shard = len(parts)
        self.pending: list[tuple[str, str, Sample]] = []
        self.bytes = 0

    def append(self, sample_id: str, split: str, sample: Sample) -> None:
        """Raises ``ValueError`` for a sample whose hidden states are not finite."""
        if not all(torch.isfinite(t).all() for t in (sample.aux, sample.final)):
            raise ValueError(f"sample {sample_id}: the target's hidden states are not finite")
        self.pending.append((sample_id, split, sample))
        self.bytes += sum(t.nbytes for t in sample)
        if self.bytes >= self.shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write the pending samples as one shard and its index part."""
        if not self.pending:
            return
        name = f"shard-{self.next_shard:05d}"
        tensors, entries = {}, []
        for slot, (sample_id, split, sample) in enumerate(self.pending):
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
                )
            )
        temporary = self.folder / f"{name}.safetensors.tmp"
        save_file(tensors, temporary)
        publish(temporary, self.folder / f"{name}.safetensors")
        part = self.folder / f"{name}.parquet.tmp"
        columns = {key: [entry[i] for entry in entries] for i, key in enumerate(Entry._fields)}
        pq.write_table(pa.table(columns), part)
        publish(part, self.folder / f"{name}.parquet")
        self.pending, self.bytes = [], 0
        self.next_shard += 1


class Store:
    """Reads samples by number; a tensor is verified the first time it is read."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = Manifest.read(folder)
        parts = sorted(folder.glob("shard-*.parquet"))
        self.entries = [entry for part in parts for entry in read_index(part)]
        for name in {entry.shard for entry in self.entries}:
            path = folder / name
            if Path(name).name != name or path.is_symlink():
                raise ValueError(f"the index names {name!r}, which is not a file of this store")
            if not path.exists():
                raise ValueError(f"shard {name} is missing from {folder}: capture again")
        self.verified: set[int] = set()

    def __len__(self) -> int:
        return len(self.entries)

    def split(self, name: str) -> list[int]:
        """Numbers of the samples of a split."""
        return [i for i, entry in enumerate(self.entries) if entry.split == name]

    def read(self, index: int) -> Sample:
        """Raises ``ValueError`` naming shard and sample when the stored bytes are not right."""
        entry = self.entries[index]
        where = f"shard {entry.shard}, sample {entry.sample}"
        try:
            with safe_open(self.folder / entry.shard, "pt") as shard:
                tensors = [shard.get_tensor(f"{entry.slot}.{key}") for key in TENSORS]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{where}: cannot be read ({error}): capture again") from error
        sample = Sample(*tensors)
        if index not in self.verified:
            self.verify(sample, entry, where)
            self.verified.add(index)
        return sample

    def verify(self, sample: Sample, entry: Entry, where: str) -> None:
        hidden, layers = self.manifest.hidden_size, len(self.manifest.layer_ids)
        shapes = [(entry.tokens,)] * 2 + [(entry.tokens, layers * hidden), (entry.tokens, hidden)]
        for key, tensor, shape, wanted in zip(TENSORS, sample, shapes, entry.hashes, strict=True):
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{where}: {key} has shape {tuple(tensor.shape)}, not {shape}")
            if digest(tensor) != wanted:
                raise ValueError(f"{where}: {key} is corrupt (its hash differs): capture again")


def read_index(part: Path) -> Iterator[Entry]:
    columns = pq.read_table(part).to_pydict()
    for values in zip(*(columns[key] for key in Entry._fields), strict=True):
        yield Entry(*values[:-1], tuple(values[-1]))


def digest(tensor: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.view(torch.uint8).numpy())


def split_of(sample_id: str, val_share: float) -> str:
    """Split by the hash of the conversation: the same text never lies on both sides."""
    return "val" if int(sample_id[:8], 16) < val_share * 2**32 else "train"


def publish(temporary: Path, path: Path) -> None:
    """Make a finished temporary file visible under its name, durably."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    os.replace(temporary, path)


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    publish(temporary, path)


def require_disk(folder: Path, needed: int) -> None:
    """Raise ``ValueError`` with need and have when the disk under ``folder`` is too small."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise ValueError(
            f"not enough disk at {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )


def token_counts(samples: Iterable[Sample], vocab_size: int) -> Int[Tensor, " V"]:
    """How often each token is the assistant's; decides which tokens a draft vocabulary keeps."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for sample in samples:
        counts += torch.bincount(sample.input_ids[sample.loss_mask], minlength=vocab_size)
    return counts
