"""What must not grow: memory with segments or with the data set, and the time to read a batch."""

import multiprocessing
from dataclasses import replace
from itertools import pairwise

import measuring
import pytest
import toy

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
LENGTH = 200


def measured(name, *arguments):
    """One figure of a new process: what another test left in the memory does not count."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=measuring.as_process, args=(theirs, name, arguments)
    )
    process.start()
    theirs.close()
    figure = ours.recv()
    process.join()
    return figure


def test_more_segments_need_less_memory(tally):
    peaks = [measured("peak_of_step", count) for count in (1, 2, 4, 8)]
    print([round(peak / 1e6) for peak in peaks], "MB for 1, 2, 4, 8 segments")
    tally("memory of 1, 2, 4, 8 segments", [
        "" if more < 0.9 * less else f"{more / 1e6:.0f} MB after {less / 1e6:.0f} MB"
        for less, more in pairwise(peaks)
    ])  # fmt: skip


@pytest.fixture
def store_of(tmp_path):
    def make(samples, length=LENGTH):
        manifest = replace(toy.make_manifest(), hidden_size=512)
        folder = tmp_path / f"store-{samples}"
        measuring.write_store(folder, manifest, samples, length)
        return folder

    return make


def test_ten_times_the_data_needs_the_same_memory(store_of, tally):
    small, large = (measured("peak_of_epoch", store_of(count)) for count in (60, 600))
    print(f"{small / 1e6:.0f} MB for 60 samples, {large / 1e6:.0f} MB for 600")
    size = 600 * LENGTH * 4 * 512 * 2
    assert size > 0.5 * small, "the data would not show"
    tally("memory for ten times the data", [
        "" if large <= 1.05 * small else f"{large / 1e6:.0f} MB after {small / 1e6:.0f} MB"
    ])  # fmt: skip


def test_the_loader_is_as_fast_as_the_disk(store_of, tally):
    disk, loader = measured("speeds", store_of(40, length=4000))
    print(f"disk {disk / 1e6:.0f} MB/s, loader {loader / 1e6:.0f} MB/s")
    tally("speed of the loader", [
        "" if loader >= 0.8 * disk else f"{loader / 1e6:.0f} of {disk / 1e6:.0f} MB/s"
    ])  # fmt: skip
