"""What every fault test uses, and the table that the command ends with."""

from pathlib import Path

import pytest
import runs
import toy

Row = tuple[str, int, int]
TABLE = pytest.StashKey[list[Row]]()
COUNTED = pytest.StashKey[bool]()


def pytest_configure(config):
    config.stash[TABLE] = []


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """A test that failed before it counted anything is in the table too."""
    report = yield
    if report.failed and "tally" in item.fixturenames and not item.stash.get(COUNTED, False):
        item.stash[COUNTED] = True
        item.config.stash[TABLE].append((item.name, 1, 0))
    return report


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[TABLE]
    if not rows:
        return
    rows = [*rows, ("all", sum(row[1] for row in rows), sum(row[2] for row in rows))]
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
        request.node.stash[COUNTED] = True
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
