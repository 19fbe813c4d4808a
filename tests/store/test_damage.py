"""Damaged and foreign stores: what is found, how it is named, and that nothing takes its place."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from random_parts import VOCABULARY, WIDTH, make_head, make_manifest, make_sample
from safetensors.torch import load_file, save_file

from peagle.cod.sampling import Cod
from peagle.store.errors import BadSample
from peagle.store.index import Entry
from peagle.store.reader import Store
from peagle.store.sample import TENSORS, digest
from peagle.store.writer import StoreWriter
from peagle.target.head import TargetHead
from peagle.target.layers import TargetLayers
from peagle.train.bad_samples import BadSamples
from peagle.train.buffers import Buffers
from peagle.train.packed_sequences import PackedSequences
from peagle.train.sampler import Pack

SHARD = "shard-00000"


@pytest.fixture
def folder(tmp_path):
    """Four samples in one shard, with the identity of their manifest."""
    manifest = make_manifest()
    writer = StoreWriter(tmp_path, shard_bytes=10**9, identity=manifest.identity())
    for number in range(4):
        writer.append(f"{number:04x}", "train", make_sample(12 + number, number))
    writer.flush()
    manifest.write(tmp_path)
    return tmp_path


def rewrite(folder, slot, key, change, *, rehash=True):
    """Change one tensor of a shard; with ``rehash`` the index agrees, as a faulty writer's does."""
    path = folder / f"{SHARD}.safetensors"
    tensors = load_file(path)
    tensors[f"{slot}.{key}"] = change(tensors[f"{slot}.{key}"]).contiguous()
    save_file(tensors, path)
    if rehash:
        change_index(folder, slot, "hashes", lambda hashes: [
            digest(tensors[f"{slot}.{key}"]) if name == key else hash_
            for name, hash_ in zip(TENSORS, hashes, strict=True)
        ])  # fmt: skip


def change_index(folder, row, column, change):
    path = folder / f"{SHARD}.parquet"
    table = pq.read_table(path)
    columns = table.to_pydict()
    columns[column][row] = change(columns[column][row])
    pq.write_table(pa.table(columns).replace_schema_metadata(table.schema.metadata), path)


def with_nan(states):
    states[2, 3] = torch.nan
    return states


def with_infinity(states):
    states[0, 0] = -torch.inf
    return states


def with_a_bit_flipped(tensor):
    flat = tensor.view(torch.uint8).flatten()
    flat[9] ^= 16
    return tensor


DAMAGE = {
    "bit flip in aux": ("aux", with_a_bit_flipped, False, "aux is corrupt"),
    "bit flip in final": ("final", with_a_bit_flipped, False, "final is corrupt"),
    "bit flip in the ids": ("input_ids", with_a_bit_flipped, False, "input_ids is corrupt"),
    "NaN": ("aux", with_nan, True, "not finite"),
    "infinity": ("final", with_infinity, True, "not finite"),
    "wrong width": ("aux", lambda t: t[:, :-1], True, r"aux is \(13, 95\)"),
    "wrong dtype": ("final", lambda t: t.float(), True, "F32, not"),
    "integer mask": ("loss_mask", lambda t: t.long(), True, "loss_mask is"),
    "states of fewer tokens": ("final", lambda t: t[:-1], True, r"final is \(12, 32\)"),
    "fewer ids": ("input_ids", lambda t: t[:-1], True, r"input_ids is \(12,\)"),
    "an id beyond the vocabulary": ("input_ids", lambda t: t + VOCABULARY, True, "token ids reach"),
    "a negative id": ("input_ids", lambda t: t - VOCABULARY, True, "token ids reach"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_one_sample_is_named_and_touches_no_other(folder, kind):
    key, change, rehash, message = DAMAGE[kind]
    rewrite(folder, 1, key, change, rehash=rehash)
    store = Store(folder)
    with pytest.raises(BadSample, match=f"^shard {SHARD}.safetensors, sample 0001: .*{message}"):
        store.read(1)
    for number in (0, 2, 3):
        assert torch.equal(store.read(number).aux, make_sample(12 + number, number).aux)


def test_a_missing_tensor_is_named(folder):
    path = folder / f"{SHARD}.safetensors"
    tensors = load_file(path)
    del tensors["2.final"]
    save_file(tensors, path)
    with pytest.raises(BadSample, match="sample 0002: cannot be read"):
        Store(folder).read(2)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_a_truncated_shard_is_named(folder, size):
    path = folder / f"{SHARD}.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(BadSample, match=f"{SHARD}.safetensors, sample 0000: cannot be read"):
        Store(folder).read(0)


def test_a_missing_shard_is_an_error_at_once_or_one_bad_sample_after_the_other(folder):
    (folder / f"{SHARD}.safetensors").unlink()
    with pytest.raises(ValueError, match=f"{SHARD}.safetensors is missing"):
        Store(folder)
    store = Store(folder, allow_missing=True)
    for number in range(4):
        with pytest.raises(BadSample, match=f"sample {number:04x}: cannot be read"):
            store.read(number)


NOT_A_SHARD = ["../secret.safetensors", "/etc/passwd", "..", "sub/x.safetensors", "",
               "shard-00001.safetensors", "shard-00000.parquet"]  # fmt: skip


@pytest.mark.parametrize("name", NOT_A_SHARD)
@pytest.mark.parametrize("allow_missing", [False, True])
def test_an_index_that_names_any_other_file_is_refused(folder, name, allow_missing):
    (folder.parent / "secret.safetensors").write_bytes(b"secret")
    change_index(folder, 2, "shard", lambda _: name)
    with pytest.raises(ValueError, match="not a file of this store"):
        Store(folder, allow_missing=allow_missing)


@pytest.mark.parametrize("suffix", ["safetensors", "parquet"])
def test_a_symlink_in_the_place_of_a_file_is_refused(folder, suffix):
    path = folder / f"{SHARD}.{suffix}"
    path.rename(folder / "elsewhere")
    path.symlink_to(folder / "elsewhere")
    with pytest.raises(ValueError, match="not a file of this store"):
        Store(folder, allow_missing=True)


def test_a_lost_part_of_the_index_is_named_and_no_shard_is_written_over(tmp_path):
    writer = StoreWriter(tmp_path, shard_bytes=1)
    for number in range(3):
        writer.append(f"{number:04x}", "train", make_sample(12, number))
    make_manifest().write(tmp_path)
    assert len(Store(tmp_path)) == 3
    (tmp_path / "shard-00001.parquet").unlink()
    before = (tmp_path / "shard-00002.safetensors").read_bytes()
    for user in (Store, lambda folder: StoreWriter(folder, shard_bytes=1)):
        with pytest.raises(ValueError, match=r"but no shard-00001\.parquet"):
            user(tmp_path)
    assert (tmp_path / "shard-00002.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "is damaged"), (b'{"target": "x"', "is damaged"), (b"\xff\xfe", "is damaged"),
     (b"[]", "not a manifest"), (b'{"format": 1}', "not a manifest")],
)  # fmt: skip
def test_a_torn_manifest_is_named(folder, content, words):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"manifest\.json {words}|manifest\.json is {words}"):
        Store(folder)


@pytest.mark.parametrize("field", ["fingerprint", "layer_ids", "tokenizer", "dtype", "answers"])
def test_a_manifest_of_another_store_is_refused(folder, field):
    value = (0, 1, 2) if field == "layer_ids" else "float16" if field == "dtype" else "other"
    make_manifest(**{field: value}).write(folder)
    with pytest.raises(ValueError, match="belongs to a store of another target"):
        Store(folder)


def test_a_shard_of_another_store_is_refused_also_by_the_writer(folder):
    foreign = make_manifest(fingerprint="0ther")
    with pytest.raises(ValueError, match="belongs to a store of another target"):
        StoreWriter(folder, shard_bytes=1, identity=foreign.identity())


def test_a_moved_target_keeps_its_store(folder):
    make_manifest(target="another/place").write(folder)
    assert len(Store(folder)) == 4


@pytest.mark.parametrize("position", range(4, 1200, 97))
def test_a_flipped_bit_in_the_index_is_refused_or_harmless(folder, position):
    path = folder / f"{SHARD}.parquet"
    right = Store(folder).entries
    content = bytearray(path.read_bytes())
    assert len(content) > 1200
    content[position] ^= 4
    path.write_bytes(content)
    try:
        found = Store(folder).entries
    except ValueError as error:
        assert SHARD in str(error)
    else:
        assert found == right  # a bit that carries nothing


def test_an_index_without_a_column_is_refused(folder):
    path = folder / f"{SHARD}.parquet"
    pq.write_table(pq.read_table(path).drop(["hashes"]), path)
    with pytest.raises(ValueError, match=f"index part {SHARD}.parquet is damaged"):
        Store(folder)


def batch_of(folder, *members):
    data = PackedSequences(
        Store(folder, allow_missing=True),
        cod=Cod(3, 0.8),
        max_rows=50,
        mask_token_id=1,
        buffers=Buffers(),
    )
    return data[Pack(members, seed=0)]


def test_a_bad_sample_is_left_out_of_its_pack_and_nothing_takes_its_place(folder):
    rewrite(folder, 1, "aux", with_nan)
    whole, without = batch_of(folder, 0, 1, 3), batch_of(folder, 0, 3)
    assert whole.bad and "sample 0001" in whole.bad[0] and not without.bad
    for ours, theirs in zip(whole[:7], without[:7], strict=True):
        assert torch.equal(ours, theirs)
    assert whole.segments == without.segments


def test_a_pack_of_bad_samples_alone_has_nothing_to_learn(folder):
    (folder / f"{SHARD}.safetensors").write_bytes(b"")
    batch = batch_of(folder, 0, 1)
    assert len(batch.bad) == 2
    assert not batch.supervised.any() and len(batch.tokens) == 1
    assert batch.aux.shape == (1, 3 * WIDTH)


def test_the_first_bad_sample_ends_a_strict_run():
    with pytest.raises(ValueError, match=r"sample x .*on_bad_sample: skip"):
        BadSamples(skip=False, budget=1.0).admit("sample x")


def test_bad_samples_are_counted_once_and_the_budget_is_kept(capsys):
    bad = BadSamples(skip=True, budget=0.1)
    bad.samples = 29
    bad.admit("sample a")
    bad.admit("sample b")
    bad.admit("sample a")
    assert list(bad.found) == ["sample a", "sample b"]
    assert capsys.readouterr().err.count("left out: sample") == 2
    with pytest.raises(ValueError, match=r"3 samples are damaged.*allows 2 of 29.*sample c"):
        bad.admit("sample c")


@pytest.mark.parametrize("budget", [-0.1, 1.5])
def test_a_budget_is_a_share(budget):
    with pytest.raises(ValueError, match=r"bad_sample_budget must lie in 0\.\.1"):
        BadSamples(skip=True, budget=budget)


def test_a_damaged_target_head_is_refused(tmp_path):
    path = tmp_path / "target.safetensors"
    head = make_head()
    head.save(path)
    assert torch.equal(TargetHead.load(path, eps=1e-6, softcap=None).head, head.head)
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is corrupt"):
        TargetHead.load(path, eps=1e-6, softcap=None)
    path.write_bytes(content[:200])
    with pytest.raises(ValueError, match="cannot be read"):
        TargetHead.load(path, eps=1e-6, softcap=None)


def test_the_head_of_another_target_is_refused(tmp_path):
    path = tmp_path / "target.safetensors"
    make_head().save(path, "this store")
    TargetHead.load(path, eps=1e-6, softcap=None, identity="this store")
    with pytest.raises(ValueError, match="belongs to a store of another target"):
        TargetHead.load(path, eps=1e-6, softcap=None, identity="another")


def test_the_layers_of_another_target_are_refused(tmp_path):
    path = tmp_path / "target_layers.safetensors"
    TargetLayers({0: {"x": torch.ones(2)}}).save(path, "this store")
    found = TargetLayers.load(path, "this store").layers
    assert list(found) == [0] and torch.equal(found[0]["x"], torch.ones(2))
    with pytest.raises(ValueError, match="belongs to a store of another target"):
        TargetLayers.load(path, "another")


def test_every_column_of_the_index_is_what_was_written(folder):
    entry = Store(folder).entries[2]
    sample = make_sample(14, 2)
    assert entry == Entry("0002", f"{SHARD}.safetensors", 2, 14, 11, "train",
                          tuple(map(digest, sample)), 2)  # fmt: skip
