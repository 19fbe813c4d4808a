"""Where the tensors of a safetensors file lie, and reading one into memory that is already there.

The library's own reader maps the file into memory. Here the caller says where a tensor goes, so
that it is copied once, from the file to its place.
"""

import json
import os
from io import FileIO
from typing import Any, NamedTuple

import xxhash
from torch import Tensor, uint8

PIECE = 2**18  # bytes read at a time: hashed in the cache, and the system sees that more is coming


class Span(NamedTuple):
    """One tensor of a file."""

    dtype: str  # as safetensors calls it
    shape: tuple[int, ...]
    start: int
    stop: int


def read_spans(file: FileIO) -> dict[str, Span]:
    """Every tensor of a file by name. Raises ``OSError`` if the file is damaged."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 + length:
        raise OSError(f"it has {size} bytes, its header alone should have {length}")
    first = 8 + length
    try:
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        spans = {name: span_of(entry, first) for name, entry in header.items()}
        end = max(span.stop for span in spans.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise OSError(f"its header is damaged: {error!r}") from error
    if size != end:
        raise OSError(f"it has {size} bytes instead of {end}")
    return spans


def span_of(entry: dict[str, Any], first: int) -> Span:
    """A tensor as the header describes it; its offsets count from the ``first`` byte behind it."""
    start, stop = (first + int(offset) for offset in entry["data_offsets"])
    return Span(entry["dtype"], tuple(entry["shape"]), start, stop)


def read_into(tensor: Tensor, file: FileIO, span: Span) -> str:
    """Fill a contiguous tensor from the file; returns the xxh3 of its bytes.

    Raises:
        OSError: if the file holds fewer bytes or more.
    """
    memory = memoryview(tensor.view(uint8).view(-1).numpy())
    if len(memory) != span.stop - span.start:
        raise OSError(f"{span.stop - span.start} bytes where {len(memory)} belong")
    digest = xxhash.xxh3_64()
    file.seek(span.start)
    while memory:
        count = file.readinto(memory[:PIECE])
        if not count:
            raise OSError(f"it ends {len(memory)} bytes too early")
        digest.update(memory[:count])
        memory = memory[count:]
    return digest.hexdigest()
