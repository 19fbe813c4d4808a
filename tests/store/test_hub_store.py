"""A store on the Hub is read as it is in its folder, at one commit, and never half."""

import os
import re
import shutil
import threading
import time

import pytest
import torch
from hub_server import TOKEN
from hub_state import User
from hub_stores import ADDRESS, NAME, fetched, opened, put_store, shards_of
from random_parts import make_manifest

from peagle.store import hub as hub_store
from peagle.store import hub_files
from peagle.store.errors import BadSample
from peagle.store.hub import find_store, store_address
from peagle.store.reader import Store
from peagle.store.shard_cache import FetchError

SHARD = r"shard-00001\.safetensors"


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(hub_files, "WAITS", (0.01, 0.01))


def at_address(problem):
    return rf"^hf://datasets/{NAME}/tiny@\w{{40}}: .*{problem}.*: put the store on the Hub again$"


def same(ours, theirs):
    return all(map(torch.equal, ours, theirs))


@pytest.mark.parametrize(
    ("text", "repo", "path", "revision"),
    [
        ("hf://datasets/a/b@main", "a/b", "", "main"),
        ("hf://datasets/a/b/x/y@v1", "a/b", "x/y", "v1"),
        ("hf://datasets/a/b/x/@refs/pr/3", "a/b", "x", "refs/pr/3"),
    ],
)
def test_an_address_names_data_set_folder_and_revision(text, repo, path, revision):
    address = store_address(text)
    assert (address.kind, address.repo, address.path) == ("dataset", repo, path)
    assert address.revision == revision and store_address(str(address)) == address


@pytest.mark.parametrize("text", ["outputs/store", "/data/hf:/x", "C@main"])
def test_a_folder_is_no_address(text):
    assert store_address(text) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("hf://datasets/a/b", "a store is a folder, or hf://datasets/OWNER/NAME/FOLDER@REVISION"),
        ("hf://a/b@main", "a store is a folder, or hf"),
        ("hf://datasets/a@main", "a store is a folder, or hf"),
        ("s3://bucket/store", "a store is a folder, or hf"),
        ("hf://datasets/a/b@main/x", "the folder goes before the revision"),
        ("hf://datasets/a/b/../c@main", r"the path on the Hub has an empty part, \. or \.\."),
        ("hf://datasets/a/b/x/./y@main", r"has an empty part, \. or \.\.: write it without"),
        ("hf://datasets/a/b/x//y@main", "the path on the Hub has an empty part"),
        ("hf://datasets/a/b//@main", "the path on the Hub has an empty part"),
    ],
)
def test_an_address_that_says_too_little_is_refused(text, words):
    with pytest.raises(ValueError, match=words):
        store_address(text)


@pytest.mark.parametrize("sub", ["", "deep/in"])
def test_every_sample_is_the_one_in_the_folder_and_a_shard_is_fetched_once(
    own_hub, random_store, sub
):
    put_store(own_hub, random_store, sub)
    ours = opened(f"hf://datasets/{NAME}{sub and '/' + sub}@main")
    theirs = Store(random_store)
    assert ours.entries == theirs.entries and len(ours) == 24 and fetched(own_hub) == []
    for _ in range(2):
        assert all(same(ours.read(i), theirs.read(i)) for i in range(24))
    assert sorted(fetched(own_hub)) == sorted(shards_of(random_store))


def test_a_branch_is_resolved_once_and_said(own_hub, random_store, capsys):
    commit = put_store(own_hub, random_store)
    store = opened()
    assert capsys.readouterr().err.count(f"store {ADDRESS[:-4]}{commit}\n") == 1
    own_hub.put(f"datasets/{NAME}", {"tiny/manifest.json": b"{}"})  # the branch moves on
    assert same(store.read(3), Store(random_store).read(3))
    again = opened(ADDRESS[:-4] + commit)
    assert again.address == store.address and again.entries == store.entries


def test_a_second_run_fetches_nothing_again(own_hub, random_store):
    commit = put_store(own_hub, random_store)
    first = opened()
    first.read(0)
    own_hub.requests.clear()
    assert same(opened(ADDRESS[:-4] + commit).read(0), first.read(0))
    assert "resolve" not in [route for route, _ in own_hub.requests]


@pytest.mark.parametrize(
    ("address", "words"),
    [
        (f"hf://datasets/{NAME}/tiny@v2", "tiny@v2 cannot be fetched: 404 .*HF_TOKEN"),
        ("hf://datasets/alice/other@main", "other@main cannot be fetched: 404"),
        (f"hf://datasets/{NAME}/none@main", "there is no store at .*/none@.*hf upload"),
        (f"hf://datasets/{NAME}/tiny@{'0' * 40}", "cannot be fetched: 404"),
    ],
)
def test_what_is_not_there_is_one_sentence(own_hub, random_store, address, words):
    put_store(own_hub, random_store)
    with pytest.raises(ValueError, match=words) as raised:
        find_store(store_address(address))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("lost", ["target.safetensors", "capture.json"])
def test_a_store_without_all_its_files_is_refused(own_hub, random_store, lost):
    put_store(own_hub, random_store)
    (random_store / lost).unlink()
    files = {f"tiny/{p.name}": p.read_bytes() for p in random_store.iterdir()}
    own_hub.put(f"datasets/{NAME}", files)
    with pytest.raises(ValueError, match=f"is no whole store, it has no {lost}"):
        find_store(store_address(ADDRESS))


def test_a_shard_that_is_not_on_the_hub_is_an_error_or_bad_samples(own_hub, random_store):
    put_store(own_hub, random_store)
    files = own_hub.content(f"datasets/{NAME}")
    del files["tiny/shard-00001.safetensors"]
    own_hub.put(f"datasets/{NAME}", files)
    with pytest.raises(ValueError, match=at_address("shard-00001.safetensors is missing")):
        opened()
    store = opened(skip=True)
    number = next(i for i, e in enumerate(store.entries) if e.shard.startswith("shard-00001"))
    with pytest.raises(BadSample, match=r"is not where the store is.*on the Hub again .*hf://"):
        store.read(number)


def test_an_index_that_is_damaged_on_the_hub_is_said_of_its_address(own_hub, random_store):
    part = random_store / "shard-00001.parquet"
    part.write_bytes(part.read_bytes()[:-20])
    put_store(own_hub, random_store)
    with pytest.raises(ValueError, match=at_address("index part shard-00001.parquet is damaged")):
        opened()


@pytest.mark.parametrize("name", ["notes.parquet", "shard-of-notes.parquet"])
def test_another_table_beside_a_store_is_no_part_of_it(own_hub, random_store, name):
    files = {f"tiny/{p.name}": p.read_bytes() for p in random_store.iterdir()}
    put_store(own_hub, random_store)
    own_hub.put(f"datasets/{NAME}", own_hub.content(f"datasets/{NAME}") | {f"tiny/{name}": b"x"})
    assert len(files) == 9 and len(opened()) == 24 and fetched(own_hub, name) == []


SMALL = ["manifest.json", "capture.json", "target.safetensors", "shard-00002.parquet"]


@pytest.mark.parametrize("name", SMALL)
def test_a_small_file_that_changed_in_the_cache_is_fetched_again(own_hub, random_store, name):
    put_store(own_hub, random_store)
    copy = opened().folder / name
    whole = copy.read_bytes()
    copy.write_bytes(whole[:-3] + bytes([whole[-3] ^ 4]) + whole[-2:])
    own_hub.requests.clear()
    assert len(opened()) == 24 and copy.read_bytes() == whole
    assert fetched(own_hub, r"[\w.-]+") == [name]


@pytest.mark.parametrize(("name", "kind"), [("manifest.json", "git"), (SMALL[3], "sha256")])
def test_a_small_file_that_comes_otherwise_is_not_kept(own_hub, random_store, name, kind):
    put_store(own_hub, random_store)
    fault = own_hub.fault("resolve", where=f"GET .*{name}", flip=True)
    with pytest.raises(FetchError, match=rf"^{name} of hf://.*/tiny@.*another content.*{kind}"):
        opened()
    assert fault.met == 3
    own_hub.faults.clear()
    assert len(opened()) == 24


def test_somebody_elses_private_store_is_not_found(own_hub, random_store, monkeypatch):
    put_store(own_hub, random_store)
    other = "hf_" + "stranger" * 4 + "aa"
    own_hub.users[other] = User("mallory")
    monkeypatch.setenv("HF_TOKEN", other)
    with pytest.raises(FetchError, match=r"404 .*a private one needs HF_TOKEN") as raised:
        find_store(store_address(ADDRESS))
    assert other not in str(raised.value)


PASSING = {
    "a cut answer": {"cut": 700, "times": 2},
    "a wrong bit": {"flip": True, "times": 1},
    "503": {"status": 503, "times": 2},
    "a dropped line": {"drop": True, "times": 1},
}


@pytest.mark.parametrize("fault", PASSING)
def test_what_passes_costs_time_only(own_hub, random_store, fault, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the client's own patience
    put_store(own_hub, random_store)
    store = opened()
    injected = own_hub.fault("resolve", where=f"GET .*{SHARD}", **PASSING[fault])
    assert all(same(store.read(i), Store(random_store).read(i)) for i in range(24))
    assert injected.met >= 1 and injected.times == 0


LASTING = {
    "a cut answer": ({"cut": 700}, "cannot be fetched: peer closed connection"),
    "a wrong bit": ({"flip": True}, "another content than the Hub says"),
    "503": ({"status": 503}, "503"),
    "gone": ({"status": 404}, "404"),
}


@pytest.mark.parametrize("fault", LASTING)
def test_what_lasts_is_no_bad_sample_and_leaves_no_shard(own_hub, random_store, fault, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda _: None)
    put_store(own_hub, random_store)
    store = opened(skip=True)
    what, words = LASTING[fault]
    own_hub.fault("resolve", where=f"GET .*{SHARD}", **what)
    number = next(i for i, e in enumerate(store.entries) if e.shard.startswith("shard-00001"))
    with pytest.raises(FetchError, match=rf"^shard-00001.safetensors of hf://.*{words}") as raised:
        store.read(number)
    assert not isinstance(raised.value, BadSample)
    names = {path.name for path in store.cache.root.rglob("*") if path.is_file()}
    assert "shard-00001.safetensors" not in names
    assert not list((store.cache.root / "arriving").iterdir())
    own_hub.faults.clear()
    assert same(store.read(number), Store(random_store).read(number))


def test_a_damaged_copy_is_fetched_anew_and_damage_on_the_hub_is_bad(own_hub, random_store):
    path = random_store / "shard-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    put_store(own_hub, random_store)
    store = opened()
    copy = store.cache.folder / "shard-00000.safetensors"
    first = store.read(0)
    copy.write_bytes(copy.read_bytes()[:-2] + b"xx")
    torn = store.cache.folder / "shard-00002.safetensors"
    torn.write_bytes(b"half")
    path.write_bytes(whole)
    expected, bad = Store(random_store), []
    for number in range(24):
        try:
            assert same(store.read(number), expected.read(number))
        except BadSample as error:
            bad.append(str(error))
    assert same(store.read(0), first)
    assert len(bad) == 1 and "shard-00001.safetensors" in bad[0]
    assert f"put the store on the Hub again (it is so at {store.address})" in bad[0]
    assert sorted(fetched(own_hub)) == sorted(2 * ["shard-00000.safetensors"] + 2 * [
        "shard-00001.safetensors"] + ["shard-00002.safetensors"])  # fmt: skip


def test_threads_that_read_one_damaged_copy_lose_no_sample(own_hub, random_store, monkeypatch):
    """Both have read it before either can do anything about it."""
    put_store(own_hub, random_store)
    store, expected = opened(), Store(random_store)
    store.read(0)
    copy = store.cache.folder / "shard-00000.safetensors"
    copy.write_bytes(copy.read_bytes()[:-2] + b"xx")
    last = max(range(8), key=lambda i: store.entries[i].slot)
    barrier, waited, read = threading.Barrier(2), set(), Store.read

    def read_together(self, index, states=None):
        try:
            return read(self, index, states)
        except BadSample:
            if threading.get_ident() not in waited:
                waited.add(threading.get_ident())
                barrier.wait(10)
            raise

    monkeypatch.setattr(Store, "read", read_together)
    found = []
    threads = [threading.Thread(target=lambda: found.append(store.read(last))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(waited) == 2 and len(found) == 2
    assert all(same(sample, read(expected, last)) for sample in found)
    assert fetched(own_hub) == 2 * ["shard-00000.safetensors"]


def test_the_header_of_a_copy_that_is_gone_is_not_taken_for_that_of_the_new_one(
    own_hub, random_store
):
    """One reader has the damaged header in hand while another fetches the shard anew."""
    put_store(own_hub, random_store)
    store, expected = opened(), Store(random_store)
    store.cache.open("shard-00000.safetensors").close()
    copy = store.cache.folder / "shard-00000.safetensors"
    content = copy.read_bytes()
    swapped = {b"0": b"1", b"1": b"0"}
    copy.write_bytes(re.sub(rb'(?<=")[01](?=\.aux")', lambda found: swapped[found[0]], content))
    assert copy.read_bytes() != content
    read_spans, entered = store.read_spans, []

    def slowly(shard):
        spans = read_spans(shard)
        entered.append(shard)
        if len(entered) == 1:
            assert same(store.read(1), expected.read(1))
        return spans

    store.read_spans = slowly
    assert same(store.read(0), expected.read(0)) and same(store.read(1), expected.read(1))
    assert len(entered) == 3 and fetched(own_hub) == 2 * ["shard-00000.safetensors"]


@pytest.mark.parametrize("folder", ["arriving", "locks", "shards"])
def test_trouble_with_the_caches_own_disk_is_no_damage(own_hub, random_store, folder):
    put_store(own_hub, random_store)
    store = opened(skip=True)
    shutil.rmtree(store.cache.root / folder)
    (store.cache.root / folder).write_bytes(b"in the way")
    with pytest.raises(FetchError, match=r"^shard-00000.safetensors cannot be .*cache.*: \[Errno"):
        store.read(0)


def test_a_cache_must_hold_two_shards_and_be_on_a_disk_that_holds_it(own_hub, random_store):
    put_store(own_hub, random_store)
    largest = max(shards_of(random_store).values())
    with pytest.raises(ValueError, match=r"cache_gb = 1e-06 does not hold two .* give 0\.01 or"):
        opened(cache_gb=1e-6)
    assert opened(cache_gb=2 * largest / 1e9 + 1e-9).cache.limit >= 2 * largest
    with pytest.raises(ValueError, match=r"is more than .* has room for: .* GB are free"):
        found = find_store(store_address(ADDRESS))
        huge = {name: file._replace(size=10**17) for name, file in found.files.items()}
        object.__setattr__(found, "files", huge)
        hub_store.open_store(found, cache_gb=1e9, allow_missing=False)


def test_two_processes_fetch_the_small_files_one_after_the_other(own_hub, random_store):
    put_store(own_hub, random_store)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(find_store(store_address(ADDRESS))))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 3 and found[0] == found[1] == found[2]
    small = [name for name in fetched(own_hub, r"[\w.-]+") if "README" not in name]
    assert len(small) == len(set(small)) == 4 + 3


def test_what_a_killed_start_left_is_cleaned_and_the_token_is_in_no_file(own_hub, random_store):
    put_store(own_hub, random_store)
    store = opened()
    leftover = store.folder.parent / ".cache/huggingface/download/tiny/x.incomplete"
    assert leftover.parent.is_dir()
    leftover.write_bytes(b"half")
    torn = store.folder / "target.safetensors"
    torn.write_bytes(b"of a crash")
    find_store(store.address)
    assert not leftover.exists()
    assert torn.read_bytes() == (random_store / "target.safetensors").read_bytes()
    store.read(0)
    files = [path for path in store.cache.root.rglob("*") if path.is_file()]
    assert len(files) > 8
    assert not [path for path in files if TOKEN.encode() in path.read_bytes()]
    assert os.environ["HF_TOKEN"] == TOKEN


def test_a_manifest_of_another_format_is_refused(own_hub, random_store):
    make_manifest(format=99).write(random_store)
    put_store(own_hub, random_store)
    with pytest.raises(ValueError, match="is not a manifest of format 1"):
        opened()
