"""The hidden-state store: safetensors shards, a Parquet index beside them, and an identity.

    store/manifest.json          whose hidden states these are
    store/target.safetensors     the target's embedding, final norm and head
    store/target_layers.safetensors   some of its layers, for a drafter to start from
    store/shard-00000.safetensors, shard-00000.parquet, ...

A shard is written to a temporary file, synced and renamed, and then its index part likewise. A
shard without its index part does not exist, so a killed writer loses at most one shard.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import xxhash
from jaxtyping import BFloat16, Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor

from peagle.data.disk import publish, write_atomically
from peagle.data.shard import Span, read_into, read_spans

FORMAT = 1
HEADERS = 256  # of shards that a store keeps in memory
SHARDS_PER_PART = 100_000  # a part's shards have numbers of its own
TENSORS = ("input_ids", "loss_mask", "aux", "final")
IDENTITY = b"peagle.identity"  # in an index part: of the store that its shard was written for


class BadSample(ValueError):  # noqa: N818 (what it is, not that it is one)
    """One sample cannot be used as it was captured; the message names it and its shard.

    Args:
        problem: all of the message but what to do.
        remedy: what to do.
    """

    def __init__(self, problem: str, remedy: str = "capture again"):
        super().__init__(f"{problem}: {remedy}")
        self.problem = problem


class DamageError(ValueError):
    """A file of a store is not as captured. ``problem`` is what is wrong, without where."""

    def __init__(self, place: Path | str, problem: str, remedy: str = "capture again"):
        super().__init__(f"{place}: {problem}: {remedy}")
        self.problem = problem


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
        try:
            found = json.loads(path.read_text())
        except ValueError as error:  # neither JSON nor, perhaps, text
            raise DamageError(folder, f"{path.name} is damaged ({error})") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(found, dict) or set(found) != known or found["format"] != FORMAT:
            raise DamageError(folder, f"{path.name} is not a manifest of format {FORMAT}")
        return cls(**{**found, "layer_ids": tuple(found["layer_ids"])})

    def identity(self) -> str:
        """Hash of all that makes the hidden states what they are; ``target`` is only a name."""
        content = {key: value for key, value in asdict(self).items() if key != "target"}
        return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())

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
    place: int  # in the store's order, whatever shard it is in


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
        part = self.folder / f"{name}.parquet.tmp"
        columns = {key: [entry[i] for entry in entries] for i, key in enumerate(Entry._fields)}
        metadata = {} if self.identity is None else {IDENTITY: self.identity}
        table = pa.table(columns).replace_schema_metadata(metadata)
        pq.write_table(table, part, write_page_checksum=True)
        publish(part, self.folder / f"{name}.parquet")
        self.pending, self.bytes = [], 0
        self.next_shard += 1


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
        for part in index_parts(folder):
            shard = part.with_suffix(".safetensors")
            entries = read_index(part, self.manifest.identity())
            for name in {entry.shard for entry in entries}:
                if name != shard.name or shard.is_symlink() or part.is_symlink():
                    raise ValueError(f"{part.name} names {name!r}, not a file of this store")
            if not self.shards.has(shard.name) and not allow_missing:
                raise DamageError(folder, f"shard {shard.name} is missing")
            found += entries
        self.entries = in_order(found)
        self.spans = lru_cache(HEADERS)(self.read_spans)

    def __len__(self) -> int:
        return len(self.entries)

    def header(self, shard: str) -> dict[str, Span]:
        return self.spans(shard)

    def read_spans(self, shard: str) -> dict[str, Span]:
        with self.shards.open(shard) as file:
            return read_spans(file)

    def split(self, name: str) -> list[int]:
        """Numbers of the samples of a split."""
        return [i for i, entry in enumerate(self.entries) if entry.split == name]

    def read(self, index: int, states: tuple[Tensor, Tensor] | None = None) -> Sample:
        """One sample, verified; ``states`` is where ``aux`` and ``final`` go, else new memory.

        Raises:
            BadSample: naming shard and sample when the stored bytes are not right.
        """
        entry = self.entries[index]
        try:
            with self.shards.open(entry.shard) as file:
                header = self.header(entry.shard)
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
            raise bad(entry, f"cannot be read ({error})") from error
        check_contents(sample, hashes, entry, self.manifest)
        return sample


def bad(entry: Entry, problem: str) -> BadSample:
    return BadSample(f"shard {entry.shard}, sample {entry.sample}: {problem}")


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
            raise bad(entry, f"{key} is {span.shape} {span.dtype}, not {shape} {dtype}")


def check_contents(sample: Sample, hashes: list[str], entry: Entry, manifest: Manifest) -> None:
    """Raise ``BadSample`` unless the tensors are the captured ones and can be trained on."""
    for key, found, written in zip(TENSORS, hashes, entry.hashes, strict=True):
        if found != written:
            raise bad(entry, f"{key} is corrupt (its hash differs)")
    if not (finite(sample.aux) and finite(sample.final)):
        raise bad(entry, "its hidden states are not finite")
    low, high = sample.input_ids.aminmax()
    if low < 0 or high >= manifest.vocab_size:
        raise bad(entry, f"token ids reach {low}..{high} of a vocabulary of {manifest.vocab_size}")


def finite(states: BFloat16[Tensor, "n D"]) -> bool:
    """Whether all bits stay below those of an infinity, for either sign.

    By numpy: torch would start threads of its own in every thread that reads.
    """
    bits = states.view(torch.uint16).numpy()
    return int(bits.max()) < 0xFF80 and int(bits.view(np.int16).max()) < 0x7F80


def in_order(entries: list[Entry]) -> list[Entry]:
    """By place, and equal documents once: several processes may each have found one.

    Equal are those of one name, tokens and loss mask: a name does not know of tools or reasoning.
    """
    once: dict[tuple[str, ...], Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.place):
        once.setdefault((entry.sample, *entry.hashes[:2]), entry)
    return list(once.values())


def number_of_shard(path: Path) -> int:
    """Of a shard's file or its index part. Raises ``ValueError`` for a file of another name."""
    digits = path.name.removeprefix("shard-").partition(".")[0]
    if not digits.isdecimal() or not path.name.startswith(f"shard-{int(digits):05d}."):
        raise ValueError(f"{path} is not a file of a store")
    return int(digits)


def index_parts(folder: Path) -> list[Path]:
    """The index in its order. Raises ``ValueError`` if a part is gone, and its samples with it."""
    parts = {number_of_shard(path): path for path in folder.glob("shard-*.parquet")}
    for number in sorted(parts):
        if number % SHARDS_PER_PART and number - 1 not in parts:
            raise DamageError(
                folder,
                f"there is {parts[number].name} but no shard-{number - 1:05d}.parquet: a part of "
                "the index is missing",
            )
    return [parts[number] for number in sorted(parts)]


def read_index(part: Path, identity: str | None = None) -> list[Entry]:
    """Raises ``ValueError`` for a damaged part, or one of a store with another ``identity``."""
    try:
        table = pq.read_table(part, page_checksum_verification=True)
        if "place" not in table.column_names:  # of an earlier version: the order of its shards
            table = table.append_column("place", [[0] * len(table)])
        columns = [table[key].to_pylist() for key in Entry._fields]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DamageError(part.parent, f"index part {part.name} is damaged ({error})") from error
    owner = (table.schema.metadata or {}).get(IDENTITY, b"").decode()
    if identity and owner and owner != identity:
        raise DamageError(
            part.parent,
            f"index part {part.name} belongs to a store of another target or with other settings "
            "than manifest.json says",
        )
    found = [Entry(*values) for values in zip(*columns, strict=True)]
    return [entry._replace(hashes=tuple(entry.hashes)) for entry in found]


def digest(tensor: Tensor) -> str:
    return xxhash.xxh3_64_hexdigest(tensor.view(torch.uint8).numpy())


def split_of(sample_id: str, val_share: float) -> str:
    """Split by the hash of the conversation: the same text never lies on both sides."""
    return "val" if int(sample_id[:8], 16) < val_share * 2**32 else "train"


def token_counts(samples: Iterable[Sample], vocab_size: int) -> Int[Tensor, " V"]:
    """How often each token is the assistant's; decides which tokens a draft vocabulary keeps."""
    counts = torch.zeros(vocab_size, dtype=torch.long)
    for sample in samples:
        counts += torch.bincount(sample.input_ids[sample.loss_mask], minlength=vocab_size)
    return counts
