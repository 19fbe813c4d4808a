"""Copies within a bound, each whole, whoever asks for it and whoever dies."""

import multiprocessing
import os
import resource
import threading
import time
from pathlib import Path

import pytest
from shard_sources import NAMES, Source, held, make_cache, of_size, read

from peagle.store import shard_cache
from peagle.store.locks import locked
from peagle.store.shard_cache import FetchError


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_copies_and_arrivals_stay_within_the_bound(tmp_path, shards):
    source = Source(tmp_path)
    cache = make_cache(tmp_path, shards=shards, source=source)
    for number in (0, 1, 2, 0, 5, 7, 1, 1, 6, 3, 0):
        assert read(cache, NAMES[number]) == of_size(NAMES[number])
        assert held(tmp_path) <= shards * 1000
    assert source.most <= shards * 1000 and source.most >= min(shards, 7) * 1000


def test_the_longest_unused_goes_first_and_what_is_finished_before_it(tmp_path):
    source = Source(tmp_path)
    cache = make_cache(tmp_path, shards=3, source=source)
    for number in (0, 1, 2, 0):
        read(cache, NAMES[number])
    read(cache, NAMES[3])  # 1 goes
    read(cache, NAMES[0])
    read(cache, NAMES[2])
    assert source.asked == [NAMES[n] for n in (0, 1, 2, 3)]
    cache.release([NAMES[2], NAMES[7]])
    read(cache, NAMES[4])  # 2 goes, though it was read last
    assert {path.name for path in cache.folder.iterdir()} == {NAMES[0], NAMES[3], NAMES[4]}


def test_an_open_file_is_read_to_its_end_after_its_copy_is_gone(tmp_path):
    cache = make_cache(tmp_path, shards=1)
    with cache.open(NAMES[0]) as file:
        read(cache, NAMES[1])
        assert not (cache.folder / NAMES[0]).exists()
        assert file.read() == of_size(NAMES[0])


def test_a_fetch_that_fails_leaves_nothing_and_the_next_one_works(tmp_path):
    source = Source(tmp_path)

    def broken(name, folder):
        (folder / name).write_bytes(b"half")
        raise ValueError("the line is cut")

    cache = make_cache(tmp_path, shards=2, source=broken)
    with pytest.raises(ValueError, match="the line is cut"):
        cache.open(NAMES[0])
    assert held(tmp_path) == 0 and not list((tmp_path / "arriving").iterdir())
    cache.fetch = source
    assert read(cache, NAMES[0]) == of_size(NAMES[0])


def test_too_many_open_files_are_no_damage(tmp_path):
    cache = make_cache(tmp_path, shards=2)
    read(cache, NAMES[0])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    for name in NAMES[:2]:  # one that is there, and one that is not
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            cache.open(name)
            error = None
        except Exception as raised:
            error = raised
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert isinstance(error, FetchError) and "Too many open files" in str(error)
        assert str(error).startswith(name)
        assert read(cache, name) == of_size(name)


def test_a_name_that_the_store_has_not_is_no_file(tmp_path):
    cache = make_cache(tmp_path, shards=2)
    assert not cache.has("shard-00099.safetensors")
    with pytest.raises(FileNotFoundError):
        cache.open("shard-00099.safetensors")


def test_a_copy_that_a_crash_of_the_machine_has_cut_is_fetched_again(tmp_path):
    cache = make_cache(tmp_path, shards=2)
    read(cache, NAMES[0])
    (cache.folder / NAMES[0]).write_bytes(b"")
    assert read(cache, NAMES[0]) == of_size(NAMES[0])


def test_many_threads_read_what_they_ask_for_and_fetch_nothing_twice(tmp_path):
    source = Source(tmp_path, delay=0.01)
    cache, wrong = make_cache(tmp_path, shards=8, source=source), []

    def work():
        wrong.extend(name for name in NAMES if read(cache, name) != of_size(name))

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and sorted(source.asked) == NAMES


def test_whoever_finds_no_room_waits_until_others_have_arrived(tmp_path):
    source = Source(tmp_path, delay=0.05)
    cache, wrong = make_cache(tmp_path, shards=2, source=source), []

    def work(first):
        for name in NAMES[first:] + NAMES[:first]:
            if read(cache, name) != of_size(name):
                wrong.append(name)

    threads = [threading.Thread(target=work, args=(n,)) for n in (0, 2, 4, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == [] and not any(thread.is_alive() for thread in threads)
    assert source.most <= 2000 and set(source.asked) == set(NAMES)


def use(root: str, seed: int, results) -> None:
    source = Source(Path(root), delay=0.002)
    cache = make_cache(Path(root), shards=3, source=source)
    order = [(seed * 5 + 3 * n + n // 7) % 8 for n in range(40)]
    right = all(read(cache, NAMES[n]) == of_size(NAMES[n]) for n in order)
    results.put((right, source.most, len(source.asked)))


def test_two_processes_share_a_cache_and_its_bound(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    processes = [context.Process(target=use, args=(str(tmp_path), n, results)) for n in (1, 2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [results.get() for _ in processes]
    assert all(right for right, _, _ in found)
    assert max(most for _, most, _ in found) <= 3000
    assert not list((tmp_path / "arriving").iterdir())


def die(root: str) -> None:
    def fetch(name, folder):
        (folder / name).write_bytes(b"half")
        os.kill(os.getpid(), 9)

    make_cache(Path(root), shards=2, source=fetch).open(NAMES[0])


@pytest.mark.parametrize("starts", [True, False])
def test_what_a_killed_process_left_takes_no_room(tmp_path, starts):
    other = make_cache(tmp_path, shards=2)
    process = multiprocessing.get_context("fork").Process(target=die, args=(str(tmp_path),))
    process.start()
    process.join(60)
    assert process.exitcode == -9 and held(tmp_path) == 4
    cache = make_cache(tmp_path, shards=2) if starts else other
    if starts:
        assert held(tmp_path) == 0
    assert [read(cache, name) for name in NAMES[1::-1]] == [of_size(n) for n in NAMES[1::-1]]
    assert held(tmp_path) == 2000 and not list((tmp_path / "arriving").iterdir())


def test_the_copies_of_another_store_count_too_and_may_go(tmp_path):
    first = make_cache(tmp_path, shards=2)
    second = make_cache(tmp_path, shards=2, store="another")
    for cache in (first, second, second):
        for name in NAMES[:2]:
            read(cache, name)
            assert held(tmp_path) <= 2000
    assert not list(first.folder.iterdir())


def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    make_cache(tmp_path, shards=2)
    monkeypatch.setattr(shard_cache, "locked", lambda path, wait=True: locked(path.with_name(
        f"{path.name}{time.monotonic_ns()}")))  # fmt: skip
    with pytest.raises(ValueError, match="without locks: set HF_ASSETS_CACHE"):
        make_cache(tmp_path, shards=2)
