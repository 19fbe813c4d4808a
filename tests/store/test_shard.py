"""Our reading of safetensors files against the library's own, and files that are not in order."""

import json

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from peagle.store import shard
from peagle.store.shard import Span, read_into, read_spans


@pytest.fixture
def path(tmp_path):
    tensors = {
        "ids": torch.arange(7),
        "mask": torch.tensor([True, False, True]),
        "states": torch.randn(5, 12).bfloat16(),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"made": "here"})
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize("piece", [1, 13, 2**18])
def test_every_tensor_is_read_as_the_library_reads_it(path, piece, monkeypatch):
    monkeypatch.setattr(shard, "PIECE", piece)
    expected = load_file(path)
    with path.open("rb", buffering=0) as file:
        spans = read_spans(file)
        assert spans.keys() == expected.keys()
        for name, tensor in expected.items():
            place = torch.empty_like(tensor)
            assert spans[name].shape == tuple(tensor.shape)
            assert read_into(place, file, spans[name]) == xxhash.xxh3_64_hexdigest(
                tensor.view(torch.uint8).numpy().tobytes()
            )
            assert torch.equal(place, tensor)
        assert [spans[name].dtype for name in ("ids", "mask", "states")] == ["I64", "BOOL", "BF16"]


def write(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(**changes):
    return {"x": {"dtype": "I64", "shape": [2], "data_offsets": [0, 16], **changes}}


@pytest.mark.parametrize(
    "header",
    [b"", b"{", b"\xff\xfe", b"[" * 100_000, [], 7, None, {}, {"x": 1}, {"x": {}},
     entry(data_offsets=[0]), entry(data_offsets=None), entry(data_offsets=["a", "b"]),
     entry(shape=None), entry(data_offsets=[0, 8]), entry(data_offsets=[0, 2**70])],
    ids=lambda header: str(header)[:40],
)  # fmt: skip
def test_a_header_that_is_not_one_is_an_error(path, header):
    write(path, entry(), b"x" * 16)
    with path.open("rb", buffering=0) as file:
        assert read_spans(file).keys() == {"x"}
    write(path, header, b"x" * 16)
    with path.open("rb", buffering=0) as file, pytest.raises(OSError):
        read_spans(file)


@pytest.mark.parametrize(
    ("size", "words"), [(0, "0 bytes"), (5, "5 bytes"), (60, "header alone"), (-1, "instead of")]
)
def test_a_file_that_was_cut_is_an_error(path, size, words):
    path.write_bytes(path.read_bytes()[:size])
    with path.open("rb", buffering=0) as file, pytest.raises(OSError, match=words):
        read_spans(file)


@pytest.mark.parametrize(
    ("start", "stop", "words"),
    [
        (8, 16, "8 bytes where 16 belong"),
        (10**6, 10**6 + 16, "too early"),
        (-40, -24, "Invalid argument"),
    ],
)
def test_a_span_that_is_not_the_tensors_is_an_error(path, start, stop, words):
    with path.open("rb", buffering=0) as file, pytest.raises(OSError, match=words):
        read_into(torch.empty(2, dtype=torch.long), file, Span("I64", (2,), start, stop))
