"""Rows of a data set: of a file of any usual kind, of a folder, or of the Hub."""

import csv
import gzip
import json
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from io import BufferedIOBase, StringIO
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from peagle.capture.columns import COLUMNS
from peagle.capture.messages import short_json
from peagle.store.errors import reason

KINDS = (".jsonl", ".json", ".parquet", ".csv", ".tsv", ".txt")  # each but Parquet also as .gz
SAVED = ("dataset_dict.json", "state.json")  # of data sets that ``datasets`` wrote
OTHER_FILES = re.compile(r"\.(gz|zip|zst|bz2|xz|tar|arrow|xlsx?|ya?ml|md|xml|pkl)$")


class Row(NamedTuple):
    place: str  # where it is, for errors: "mine.jsonl, line 3"; counted from 1
    content: dict[str, Any]


def is_local(source: str) -> bool:
    """Whether a source is a path; a Hub id has one slash at most, and no file's ending."""
    path = Path(source)
    return bool(
        kind_of(path)
        or OTHER_FILES.search(source)
        or source.startswith(("/", ".", "~"))
        or source.count("/") > 1
        or path.exists()
    )


def kind_of(path: Path) -> str | None:
    """Its ending without ``.gz``, if that is one that can be read."""
    ending = Path(path.name.removesuffix(".gz")).suffix.lower()
    return ending if ending in KINDS else None


def read_local(path: Path, split: str) -> Iterator[Row]:
    """The rows of a file, or of a folder that ``datasets`` can read.

    Raises:
        ValueError: naming the file, and where it can the line, if something is wrong with it; or
            for a file of a folder that would be skipped.
    """
    kind = kind_of(path)
    if path.is_dir():
        files = files_of(path, split)
        if not files:
            return numbered(from_folder(path, split), path)
        return chain.from_iterable(read_local(file, split) for file in files)
    if not path.is_file():
        raise ValueError(f"prompt file {path} does not exist")
    if kind is None:
        raise ValueError(f"prompt file {path} must end in {', '.join(KINDS)} (or .gz of these)")
    if kind == ".parquet":
        return numbered(read_parquet(path), path)
    readers = {".jsonl": read_jsonl, ".json": read_json_file, ".txt": read_lines}
    return unpacked(path, readers.get(kind, read_csv))


def unpacked(path: Path, reader: Any) -> Iterator[Row]:
    """What a reader makes of the file; bytes end a line at \\n only, a text has others."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            yield from reader(path, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be unpacked: {error}") from error


def numbered(rows: Iterable[dict[str, Any]], name: Any) -> Iterator[Row]:
    """Rows with their numbers; whatever a library raises while it reads is one sentence."""
    number = 0
    try:
        for number, row in enumerate(rows, 1):
            content = {key: without_fill(value) for key, value in row.items()}
            yield Row(f"{name}, row {number}", content)
    except Exception as error:  # clients and readers raise many kinds; all mean one thing
        raise ValueError(f"{name} cannot be read after {number} rows: {reason(error)}") from error


def without_fill(value: Any) -> Any:
    """What Arrow read, without the nulls that it gives an object for keys that only others have.

    A tool would otherwise offer the parameters of all other tools of the data set.
    """
    if isinstance(value, dict):
        return {key: without_fill(item) for key, item in value.items() if item is not None}
    return [without_fill(item) for item in value] if isinstance(value, list) else value


def read_parquet(path: Path) -> Iterator[dict[str, Any]]:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(1000):
            yield from batch.to_pylist()


def files_of(path: Path, split: str) -> list[Path]:
    """A folder's files that ``datasets`` finds for a split, none if it must read them itself.

    Raises ``ValueError`` for a file that it would skip: one of another kind, or of no split.
    """
    from datasets import load_dataset_builder  # takes seconds to import
    from datasets.data_files import FILES_TO_IGNORE

    if any((path / name).exists() for name in SAVED):
        return []
    try:
        builder = load_dataset_builder(str(path))
    except Exception:  # whatever is wrong is said when it is read
        return []
    configs = [config.data_files or {} for config in builder.builder_configs.values()]
    used = {Path(name).resolve() for files in configs for names in files.values() for name in names}
    for file in sorted(path.rglob("*")):
        inside = file.relative_to(path)
        notes = file.name in FILES_TO_IGNORE or file.stem.isupper()  # such as LICENSE.txt
        hidden = any(part.startswith((".", "__")) for part in inside.parts)
        if kind_of(file) and not notes and not hidden and file.resolve() not in used:
            raise ValueError(
                f"{path} holds {inside}, which is of another kind or split than its other files "
                "and would be skipped: give it as a prompt set of its own, from another folder"
            )
    files = [Path(name) for name in (builder.config.data_files or {}).get(split, ())]
    own = all(kind_of(file) not in (None, ".txt") and file.is_file() for file in files)
    return files if own else []


def from_folder(path: Path, split: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset, load_from_disk  # takes seconds to import

    if (path / "dataset_dict.json").exists():
        found = load_from_disk(str(path))
        if split not in found:
            raise ValueError(f"its splits are {', '.join(found)}, and {split!r} is asked for")
        yield from found[split]
    elif (path / "state.json").exists():
        yield from load_from_disk(str(path))
    else:
        yield from load_dataset(str(path), split=split, streaming=True)


def read_jsonl(path: Path, file: BufferedIOBase) -> Iterator[Row]:
    """Raises ``ValueError`` with file and line for what is not an object in JSON."""
    for number, line in enumerate(file, 1):
        if line.strip():
            place = f"{path}, line {number}"
            yield Row(place, as_row(parse(decoded(line, place), place), place))


def read_json_file(path: Path, file: BufferedIOBase) -> Iterator[Row]:
    """A list of objects, one object with such a list, or lines of JSON after all."""
    text = decoded(file.read(), str(path))
    try:
        found = parse(text, str(path))
    except ValueError as error:
        if "Extra data" not in str(error):
            raise
        file.seek(0)
        yield from read_jsonl(path, file)
        return
    if isinstance(found, dict):
        [(key, value), *others] = found.items() or [(None, None)]
        found = value if isinstance(value, list) and not others and key not in COLUMNS else [found]
    if not isinstance(found, list):
        raise ValueError(f"{path} must hold a list of objects, not {short_json(found)}")
    for number, row in enumerate(found, 1):
        place = f"{path}, row {number}"
        yield Row(place, as_row(row, place))


def read_lines(path: Path, file: BufferedIOBase) -> Iterator[Row]:
    """Every line is a prompt."""
    for number, line in enumerate(file, 1):
        place = f"{path}, line {number}"
        if line.strip():
            yield Row(place, {"prompt": decoded(line, place)})


def read_csv(path: Path, file: BufferedIOBase) -> Iterator[Row]:
    """By Python's own reader: every cell stays the text that it is."""
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if kind_of(path) == ".tsv" else ","
    text = decoded(file.read(), str(path))
    reader = csv.DictReader(StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        names = [name for name in reader.fieldnames or () if name]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"{path} has two columns {twice!r}: rename or remove one")
        for number, row in enumerate(reader, 1):
            place = f"{path}, row {number}"
            if None in row or None in row.values():
                raise ValueError(f"{place} has not as many cells as the first line has names")
            yield Row(place, row)
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num} is not CSV ({error})") from error


def decoded(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8-sig").strip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{place} is not UTF-8 text") from error


def parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno} " if error.lineno > 1 else ""
        raise ValueError(
            f"{place} is not JSON ({error.msg} {where}column {error.colno})"
        ) from error
    except RecursionError as error:
        raise ValueError(f"{place} is nested too deep") from error


def as_row(found: Any, place: str) -> dict[str, Any]:
    if not isinstance(found, dict):
        what = 'must be an object as {"prompt": "..."} is'
        raise ValueError(f"{place} {what}, not {short_json(found)}")
    return found
