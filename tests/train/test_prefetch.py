"""The same items in the same order, whoever reads them and when."""

import threading
import time

import pytest

from peagle.train.prefetch import ReadAhead

THREADS = [0, 1, 2, 5]


@pytest.mark.parametrize("threads", THREADS)
def test_the_order_is_that_of_the_items_however_long_each_takes(threads):
    def read(number):
        time.sleep(0.02 if number % 3 == 0 else 0.0)
        return number * number

    loader = ReadAhead(read, range(10), threads=threads)
    assert len(loader) == 10
    for _ in range(2):
        assert list(loader) == [0, 1, 4, 9, 16, 25, 36, 49, 64, 81]
    assert list(ReadAhead(read, [], threads=threads)) == []


@pytest.mark.parametrize("threads", THREADS)
def test_what_comes_next_is_read_meanwhile_and_no_more(threads):
    begun = []
    batches = iter(ReadAhead(lambda n: begun.append(n) or n, range(100), threads=threads))
    assert next(batches) == 0
    deadline = time.monotonic() + 10
    while len(begun) <= threads and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)
    assert sorted(begun) == list(range(threads + 1))


@pytest.mark.parametrize("threads", THREADS)
def test_an_error_comes_in_its_turn_as_it_was_raised(threads):
    def read(number):
        if number == 3:
            raise ValueError("sample 3 is bad")
        return number

    batches = iter(ReadAhead(read, range(9), threads=threads))
    assert [next(batches) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match=r"^sample 3 is bad$"):
        next(batches)


@pytest.mark.parametrize("threads", THREADS)
def test_the_items_are_asked_for_when_an_epoch_begins(threads):
    asked = []

    class Items:
        def __iter__(self):
            asked.append(True)
            return iter(range(3))

    batches = iter(ReadAhead(str, Items(), threads=threads))
    assert asked == [True]
    assert list(batches) == ["0", "1", "2"]


def test_no_thread_is_left_when_nobody_iterates_any_more():
    before = threading.active_count()
    batches = iter(ReadAhead(str, range(100), threads=3))
    next(batches)
    assert threading.active_count() > before
    del batches
    assert threading.active_count() == before
