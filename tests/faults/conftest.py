"""What every fault test uses, and the table that the command ends with."""

from pathlib import Path

import pytest
import runs
import toy

TABLE = pytest.StashKey[list[tuple[str, int, int]]]()


def pytest_configure(config):
    config.stash[TABLE] = []


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[TABLE]
    if not rows:
        return
    width = max(len(fault) for fault, _, _ in rows)
    terminalreporter.section("faults")
    terminalreporter.line(f"{'fault'.ljust(width)}  tried  survived")
    for fault, tried, survived in rows:
        bad = {} if survived == tried else {"red": True}
        terminalreporter.line(f"{fault.ljust(width)}  {tried:5}  {survived:8}", **bad)


@pytest.fixture
def tally(request):
    """``tally(fault, problems)``: one problem per trial, empty if it was survived."""

    def count(fault: str, problems: list[str]) -> None:
        assert problems, "nothing was tried"
        survived = sum(not problem for problem in problems)
        request.config.stash[TABLE].append((fault, len(problems), survived))
        assert survived == len(problems), [problem for problem in problems if problem]

    return count


@pytest.fixture(scope="session")
def store(tmp_path_factory) -> Path:
    return toy.make_store(tmp_path_factory.mktemp("toy") / "store")


@pytest.fixture(scope="session")
def reference(store) -> Path:
    """The uninterrupted run, with a checkpoint after each of its steps."""
    run_dir = store.parent / "reference"
    runs.finish(run_dir, store, every_n_steps=1)
    return run_dir
