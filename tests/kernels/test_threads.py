"""A fit whose threads outnumber the free cores says so, with numbers that are given here."""

import math
import os

import pytest
import torch

from peagle.kernels import threads
from peagle.kernels.threads import advice, advise_threads, busy_seconds, core_quota


@pytest.mark.parametrize(
    ("count", "cores", "busy", "quota", "right"),
    [
        (2, 2, 0.3, math.inf, None),
        (2, 2, 1.0, math.inf, 1),
        (2, 2, 5.0, math.inf, 1),  # a load may exceed the cores
        (1, 2, 2.0, math.inf, None),  # fewer than one there is not
        (64, 64, 10.2, math.inf, 54),
        (64, 64, 0.0, 2.0, 2),
        (2, 64, 30.0, 4.0, None),
    ],
)
def test_the_advice_is_as_many_threads_as_there_are_free_cores(count, cores, busy, quota, right):
    line = advice(count, cores=cores, busy=busy, quota=quota)
    assert (line is None) == (right is None)
    assert line is None or (line.endswith(f"OMP_NUM_THREADS={right}") and "\n" not in line)
    assert line is None or ("container" in line) == (quota == 2.0)


def test_only_the_work_of_the_cores_that_may_be_used_counts(tmp_path):
    ticks = os.sysconf("SC_CLK_TCK")
    rows = {"cpu": [9] * 10, "cpu0": [1, 2, 3, 70, 80, 4, 5, 6, 1, 2], "cpu1": [9] * 10,
            "cpu10": [1, 0, 0, 9, 9, 0, 0, 0, 0, 0], "ctxt": [12345]}  # fmt: skip
    path = tmp_path / "stat"
    path.write_text("".join(f"{name} {' '.join(map(str, v))}\n" for name, v in rows.items()))
    assert busy_seconds({0, 10}, path) == pytest.approx((21 + 1) / ticks)
    assert busy_seconds({0}, tmp_path / "none") is None


def test_a_containers_limit_is_read(tmp_path):
    for text, cores in (("150000 100000\n", 1.5), ("max 100000\n", math.inf)):
        (tmp_path / "cpu.max").write_text(text)
        assert core_quota(tmp_path / "cpu.max") == cores
    assert core_quota(tmp_path / "none") == math.inf


def test_one_thread_and_other_devices_are_not_measured(monkeypatch):
    monkeypatch.setattr(threads, "busy_cores", lambda cores: float(len(cores)))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert advise_threads("cpu").startswith("64 threads compute")
    monkeypatch.setattr(threads, "busy_cores", lambda _: pytest.fail("measured"))
    assert advise_threads("cuda") is None
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert advise_threads("cpu") is None
