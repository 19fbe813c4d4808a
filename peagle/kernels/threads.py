"""Whether each thread that computes has a core of its own.

The threads of a product wait for the last of them, so one that shares its core with another program
holds up all: with two threads on busy cores a step took two to five times as long as with one.
"""

import math
import os
import time
from pathlib import Path

import torch

SAMPLE_S = 0.5
STAT, QUOTA = Path("/proc/stat"), Path("/sys/fs/cgroup/cpu.max")


def advise_threads(device: torch.device | str) -> str | None:
    """One line with what to do, if this process computes on the CPU with too many threads."""
    threads = torch.get_num_threads()
    if torch.device(device).type != "cpu" or threads == 1:
        return None
    cores = usable_cores()
    return advice(threads, cores=len(cores), busy=busy_cores(cores), quota=core_quota())


def advice(threads: int, *, cores: int, busy: float, quota: float = math.inf) -> str | None:
    """One line if fewer than ``threads`` cores are free.

    Args:
        cores: that this process may run on.
        busy: how many of them other programs use.
        quota: cores' worth of time that a container may use.
    """
    free = max(1, round(min(cores - busy, quota)))
    if threads <= free:
        return None
    why = (
        f"this container may use {quota:g} cores"
        if quota < cores - busy
        else f"other programs use {busy:.1f} of {cores} cores"
    )
    return (
        f"{threads} threads compute, and {why}: the threads wait for each other, and a step may "
        f"take several times as long. Start again with OMP_NUM_THREADS={free}"
    )


def usable_cores() -> set[int]:
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def core_quota(path: Path = QUOTA) -> float:
    """Cores' worth of time that a container may use; infinite where nothing limits it."""
    try:
        time_in_period, period = path.read_text().split()
        return int(time_in_period) / int(period)
    except (OSError, ValueError):  # "max"
        return math.inf


def busy_cores(cores: set[int], seconds: float = SAMPLE_S) -> float:
    """How many of the cores others use now; the load, where the system tells nothing else.

    The load is the mean of a minute, and this program's own work is part of it.
    """
    before, own, begin = busy_seconds(cores), time.process_time(), time.monotonic()
    if before is None:
        return os.getloadavg()[0]
    time.sleep(seconds)
    used = busy_seconds(cores) - before - (time.process_time() - own)
    return max(0.0, used / (time.monotonic() - begin))


def busy_seconds(cores: set[int], path: Path = STAT) -> float | None:
    """Time that the cores have worked since the system's start; None where it is not told."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    ticks = 0
    for name, *fields in map(str.split, lines):
        if name[:3] == "cpu" and name[3:].isdecimal() and int(name[3:]) in cores:
            user, nice, system, _idle, _waiting, irq, softirq, stolen = map(int, fields[:8])
            ticks += user + nice + system + irq + softirq + stolen
    return ticks / os.sysconf("SC_CLK_TCK")
