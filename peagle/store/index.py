"""The index of a store: a Parquet file beside every shard, with a line for each sample."""

import re
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from peagle.store.disk import rename_durably
from peagle.store.errors import StoreError

SHARDS_PER_PROCESS = 100_000  # processes that share a capture number their shards apart
IDENTITY = b"peagle.identity"  # in an index file: of the store that its shard was written for


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


def split_of(sample_id: str, val_share: float) -> str:
    """Split by the hash of what is asked: the same text never lies on both sides."""
    return "val" if int(sample_id[:8], 16) < val_share * 2**32 else "train"


def sort_and_deduplicate(entries: list[Entry]) -> list[Entry]:
    """By place, and equal documents once: several processes may each have found one.

    Equal are those of one name, tokens and loss mask: a name does not know of tools or reasoning.
    """
    once: dict[tuple[str, ...], Entry] = {}
    for entry in sorted(entries, key=lambda entry: entry.place):
        once.setdefault((entry.sample, *entry.hashes[:2]), entry)
    return list(once.values())


def shard_number(path: Path) -> int:
    """Of a shard's file or its index file. Raises ``ValueError`` for a file of another name."""
    digits = path.name.removeprefix("shard-").partition(".")[0]
    if not digits.isdecimal() or not path.name.startswith(f"shard-{int(digits):05d}."):
        raise ValueError(f"{path} is not a file of a store")
    return int(digits)


def unfinished_files(folder: Path) -> list[Path]:
    """What a killed writer left of its shards and their index files, and nothing else."""
    name = re.compile(r"shard-\d{5,}\.(safetensors|parquet)\.tmp")
    return [path for path in folder.glob("shard-*.tmp") if name.fullmatch(path.name)]


def index_files(folder: Path) -> list[Path]:
    """The index in its order. Raises ``StoreError`` if a file is gone, and its samples with it."""
    files = {shard_number(path): path for path in folder.glob("shard-*.parquet")}
    for number in sorted(files):
        if number % SHARDS_PER_PROCESS and number - 1 not in files:
            raise StoreError(
                folder,
                f"there is {files[number].name} but no shard-{number - 1:05d}.parquet: a part of "
                "the index is missing",
            )
    return [files[number] for number in sorted(files)]


def read_index(path: Path, identity: str | None = None) -> list[Entry]:
    """Raises ``StoreError`` for a damaged file, or one of a store with another ``identity``."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        if "place" not in table.column_names:  # of an earlier version: the order of its shards
            table = table.append_column("place", [[0] * len(table)])
        columns = [table[key].to_pylist() for key in Entry._fields]
    except (pa.ArrowException, OSError, KeyError) as error:
        raise StoreError(path.parent, f"index part {path.name} is damaged ({error})") from error
    owner = (table.schema.metadata or {}).get(IDENTITY, b"").decode()
    if identity and owner and owner != identity:
        raise StoreError(
            path.parent,
            f"index part {path.name} belongs to a store of another target or with other settings "
            "than manifest.json says",
        )
    found = [Entry(*values) for values in zip(*columns, strict=True)]
    return [entry._replace(hashes=tuple(entry.hashes)) for entry in found]


def write_index(folder: Path, name: str, entries: list[Entry], identity: str | None) -> None:
    """The index file of a shard that is on the disk; the shard exists from now on."""
    temporary = folder / f"{name}.parquet.tmp"
    columns = {key: [entry[i] for entry in entries] for i, key in enumerate(Entry._fields)}
    metadata = {} if identity is None else {IDENTITY: identity}
    table = pa.table(columns).replace_schema_metadata(metadata)
    pq.write_table(table, temporary, write_page_checksum=True)
    rename_durably(temporary, folder / f"{name}.parquet")
