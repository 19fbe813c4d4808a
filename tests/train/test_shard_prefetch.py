"""What comes next is fetched meanwhile, no further than the cache holds, in the same order."""

import threading
import time

import pytest
from shard_sources import NAMES, SIZES, Source, held, make_cache, of_size, read

from peagle.train.prefetch import ReadAhead
from peagle.train.sampler import Pack
from peagle.train.shard_prefetch import FetchAhead, Window, bytes_to_fetch, traffic

PACKS = [Pack((n, n + 1), seed=n) for n in range(7)]


def needs(pack):
    return [NAMES[n] for n in pack.samples]


def ahead(cache, *, threads=2, lag=0, packs=PACKS):
    return FetchAhead(packs, needs, cache, threads=threads, lag=lag)


def wait_for(condition):
    deadline = time.monotonic() + 10
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert condition()


@pytest.mark.parametrize("threads", [0, 1, 3])
@pytest.mark.parametrize("shards", [2, 4, 20])
def test_the_packs_are_the_same_in_the_same_order(tmp_path, threads, shards):
    packs = ahead(make_cache(tmp_path, shards=shards), threads=threads)
    assert len(packs) == 7
    for _ in range(2):
        assert list(packs) == PACKS


def test_the_shards_of_later_packs_are_there_before_they_are_read(tmp_path):
    source = Source(tmp_path)
    packs = iter(ahead(make_cache(tmp_path, shards=5, source=source), threads=1))
    assert next(packs) == PACKS[0]
    wait_for(lambda: len(source.asked) == 4)
    time.sleep(0.05)
    assert source.asked == NAMES[:4], "one place is left for whoever reads something else"
    for _ in range(3):
        next(packs)
    wait_for(lambda: {path.name for path in tmp_path.glob("shards/*/*")} >= set(NAMES[3:7]))
    assert len(source.asked) == 7 and held(tmp_path) <= 5000


LONG = [Pack((n,), seed=m) for n in range(8) for m in range(4)]  # four packs of each shard


@pytest.mark.parametrize("packs", [PACKS, LONG], ids=["in passing", "read for long"])
def test_each_shard_comes_once_although_the_cache_is_smaller_than_the_store(tmp_path, packs):
    """What was fetched first for later is then the longest unused, but nothing else is finished."""

    def read_slowly(pack):
        time.sleep(0.005)
        return [read(cache, NAMES[n]) for n in pack.samples]

    source = Source(tmp_path, delay=0.001)
    cache = make_cache(tmp_path, shards=4, source=source)
    order = FetchAhead(packs, needs, cache, threads=1, lag=1)
    read_packs = list(ReadAhead(read_slowly, order, threads=1))
    assert read_packs == [[of_size(name) for name in needs(pack)] for pack in packs]
    assert sorted(source.asked) == NAMES


def test_an_error_comes_from_the_reader_in_its_turn(tmp_path):
    def fetch(name, folder):
        if name == NAMES[3]:
            raise ValueError(f"{name} does not come")
        return Source(tmp_path)(name, folder)

    cache = make_cache(tmp_path, shards=20, source=fetch)
    batches = iter(ReadAhead(
        lambda pack: [read(cache, name) for name in needs(pack)], ahead(cache, lag=1), threads=1
    ))  # fmt: skip
    assert len([next(batches), next(batches)]) == 2
    with pytest.raises(ValueError, match="does not come"):
        next(batches)


def test_no_thread_goes_on_when_nobody_iterates_any_more(tmp_path):
    before = set(threading.enumerate())  # some may be those of another test, about to end
    packs = iter(ahead(make_cache(tmp_path, shards=20), threads=3))
    next(packs)
    ours = set(threading.enumerate()) - before
    assert len(ours) == 3
    del packs
    wait_for(lambda: not any(thread.is_alive() for thread in ours))


def test_a_window_holds_what_fits_and_the_pack_that_is_asked_for():
    lists = [["a"], ["a", "b"], ["c"], ["a", "d", "e"], ["f"]]
    window = Window(lists, dict.fromkeys("abcdef", 10), room=20)
    assert window.extend(0) == ["a", "b"]
    assert window.leave(1) == [] and window.extend(1) == []
    assert window.leave(2) == ["a", "b"] and window.extend(2) == ["c"]
    assert window.leave(3) == ["c"] and window.extend(3) == ["a", "d", "e"]
    assert window.leave(4) == ["a", "d", "e"] and window.extend(4) == ["f"]
    assert window.leave(2) == []


ORDERS = {  # three shards of ten bytes: bytes fetched with room for one, two, three
    "one after the other": ("aabbcc", [30, 30, 30]),
    "in turn": ("abcabc", [60, 60, 30]),
    "two and then one": ("ababcc", [50, 30, 30]),
}


@pytest.mark.parametrize("order", ORDERS)
def test_what_an_order_fetches_is_counted_as_a_cache_would(order):
    letters, expected = ORDERS[order]
    sizes = dict.fromkeys("abc", 10)
    packs = [[letter] for letter in letters]
    assert [bytes_to_fetch(packs, sizes, room) for room in (10, 20, 30)] == expected


def test_an_order_that_fetches_much_comes_with_advice(tmp_path):
    few, many = make_cache(tmp_path, shards=2), make_cache(tmp_path, shards=8)
    again = [[name] for name in NAMES] * 3
    said = traffic("an epoch", again, few)
    assert said.startswith("an epoch fetches about 2.4e-05 GB")
    assert sum(SIZES.values()) == 8000 and said.endswith(": with data.cache_gb 0.01 it is less")
    assert "with" not in traffic("an epoch", again, many, blocks=8)


@pytest.mark.parametrize(("shards", "blocks", "advised"), [(2, 8, 1), (5, 8, 2), (5, 3, 2),
                                                           (7, 8, 3)])  # fmt: skip
def test_the_blocks_that_are_advised_fit_twice_and_fetch_each_shard_once(
    tmp_path, shards, blocks, advised
):
    cache = make_cache(tmp_path, shards=shards)
    again = [[name] for name in NAMES] * 3
    said = traffic("an epoch", again, cache, blocks=blocks)
    assert said.endswith(f"data.cache_gb 0.01, or with data.block_shards {advised}, it is less")
    in_blocks = [[name] for n in range(0, 8, advised) for name in NAMES[n : n + advised] * 3]
    assert bytes_to_fetch(in_blocks, cache.sizes, cache.limit) == 8000


def test_blocks_that_are_small_enough_are_not_advised(tmp_path):
    again = [[name] for name in NAMES] * 3
    said = traffic("an epoch", again, make_cache(tmp_path, shards=5), blocks=2)
    assert "cache_gb 0.01 it is less" in said and "block_shards" not in said
