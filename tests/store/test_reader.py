from collections import namedtuple

import pytest
import torch
from random_parts import make_manifest, make_sample

from peagle.store import disk
from peagle.store.disk import require_disk
from peagle.store.index import split_of
from peagle.store.manifest import Manifest
from peagle.store.reader import Store
from peagle.store.writer import StoreWriter
from peagle.train.draft_vocab import token_counts


def test_what_is_written_is_read_back_bit_for_bit(random_store):
    store = Store(random_store)
    assert len(store) == 24
    for number in range(24):
        written, read = make_sample(10 + (number * 7) % 31, number), store.read(number)
        assert all(torch.equal(a, b) for a, b in zip(written, read, strict=True))
        assert read.aux.dtype == torch.bfloat16


def test_a_writer_goes_on_where_an_earlier_one_was_killed(tmp_path):
    first = StoreWriter(tmp_path, shard_bytes=1)
    first.append("aa", "train", make_sample(9, 0))
    (tmp_path / "shard-00001.safetensors").write_bytes(b"torn")  # killed before its index part
    (tmp_path / "shard-00002.safetensors.tmp").write_bytes(b"torn")
    second = StoreWriter(tmp_path, shard_bytes=1)
    assert [(entry.sample, entry.place) for entry in second.done] == [("aa", 0)]
    second.append("bb", "train", make_sample(7, 1))
    make_manifest().write(tmp_path)
    assert [entry.sample for entry in Store(tmp_path).entries] == ["aa", "bb"]
    assert torch.equal(Store(tmp_path).read(1).aux, make_sample(7, 1).aux)
    assert not list(tmp_path.glob("*.tmp"))


def test_hidden_states_that_are_not_finite_are_refused(tmp_path):
    sample = make_sample(9, 0)
    sample.aux[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"sample aa: .* not finite"):
        StoreWriter(tmp_path, shard_bytes=1).append("aa", "train", sample)


def test_an_unfinished_store_is_no_store(random_store):
    (random_store / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no store at"):
        Store(random_store)


@pytest.mark.parametrize(
    ("field", "value"),
    [("fingerprint", "other"), ("layer_ids", (1, 2)), ("tokenizer", "other"), ("answers", "x")],
)
def test_a_store_of_another_identity_is_refused_by_field(random_store, field, value):
    with pytest.raises(ValueError, match=f"captured with {field} = "):
        Manifest.read(random_store).check(make_manifest(**{field: value}))


def test_the_same_target_under_another_name_is_the_same_target(random_store):
    Manifest.read(random_store).check(make_manifest(target="moved/elsewhere"))


def test_too_little_disk_states_need_and_have(tmp_path, monkeypatch):
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(10**9))
    with pytest.raises(ValueError, match=r"5\.00 GB needed, 1\.00 GB free"):
        require_disk(tmp_path, 5 * 10**9)


def test_the_split_is_a_function_of_the_conversation():
    ids = [f"{n * 2654435761 % 2**32:08x}" for n in range(4000)]
    val = [i for i in ids if split_of(i, 0.1) == "val"]
    assert 300 < len(val) < 500
    assert set(val) <= {i for i in ids if split_of(i, 0.2) == "val"}


def test_token_counts_look_at_the_assistant_only():
    sample = make_sample(12, 0, prompt=5)
    counts = token_counts([sample], 48)
    assert counts.sum() == 7
    assert counts[sample.input_ids[5]] > 0


def test_a_store_of_an_older_release_knows_the_first_part_of_a_fingerprint():
    older, wanted = make_manifest(fingerprint="ab12"), make_manifest(fingerprint="ab12-cd34")
    older.check(wanted)
    with pytest.raises(ValueError, match="fingerprint"):
        older.check(make_manifest(fingerprint="ab13-cd34"))
    with pytest.raises(ValueError, match="fingerprint"):
        wanted.check(make_manifest(fingerprint="ab12-cd35"))
