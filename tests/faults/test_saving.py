"""A save that is killed, or for which there is no room, takes nothing away."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from runs import finish, last, lines, losses, same_training, some, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
MEGABYTES = 60
NO_SPACE = re.compile(r"it needs (\d+\.\d) MB, (\d+\.\d) MB are free; the previous checkpoint")


@pytest.fixture
def tmpfs(tmp_path):
    """A small file system of its own, of the size that is asked for; mounting it needs root."""
    mounted = []

    def mount(name: str, megabytes: int) -> Path:
        path = tmp_path / name
        path.mkdir()
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], check=True
        )
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", path], check=True)


@pytest.fixture
def other_disk(tmp_path):
    """A folder on another file system than the run's."""
    path = Path("/dev/shm") / tmp_path.name
    assert os.stat("/dev/shm").st_dev != os.stat(tmp_path).st_dev
    path.mkdir(exist_ok=True)
    yield path
    for leftover in path.iterdir():
        leftover.unlink()
    path.rmdir()


@pytest.mark.short
def test_kill_9_during_a_save(store, reference, tmp_path, other_disk, tally):
    """One run, killed in save after save until it has had them all; then it is the reference."""
    run_dir = tmp_path / "run"
    ballast = {"megabytes": MEGABYTES}
    finish(tmp_path / "measure", store, "--trainer.max_steps=1", inject=[("Ballast", ballast)])
    problems, moments = [], {"before": 0, "in": 0, "after": 0}
    step = 0
    for trial in range(some(20, 3)):
        fault = {**ballast, "seed": trial, "seconds": 0.25}
        run = start(
            run_dir,
            store,
            "--ckpt_path",
            "last",
            inject=[("KillInSave", fault)],
            every_n_steps=2,
            environment={"TMPDIR": str(other_disk)},
        )
        code = run.wait()
        files = {path.name for path in (run_dir / "checkpoints").glob("*")}
        torn = "last.ckpt.tmp" in files
        saved = last(run_dir)["global_step"] if "last.ckpt" in files else 0
        moments["in" if torn else "after" if saved > step else "before"] += 1
        problem = "" if code == -9 else f"exit code {code}: {run.said()[-300:]}"
        if saved not in (step, step + 2) or list(other_disk.iterdir()):
            problem += f" checkpoint of step {saved} after {step}, {list(other_disk.iterdir())}"
        problems.append(problem)
        step = saved
    assert moments["in"] or some(0, 1), f"no kill hit a save: {moments}"
    finish(run_dir, store, "--ckpt_path", "last")
    assert not list(run_dir.rglob("*.tmp"))
    problems.append(same_training(run_dir, reference))
    tally("kill -9 during a save, TMPDIR on another disk", problems)
    # Each start found the torn file of the kill before it, and none was left when training began.
    stale = run_dir / "stale-0.txt"
    found = lines(stale) if stale.exists() else []
    tally("torn files cleaned up by the next start", [""] * (moments["in"] - len(found)) + found)


def assert_named(said: str) -> None:
    need, have = map(float, NO_SPACE.search(said).groups())
    assert have < need, said
    assert "Traceback" not in said


def test_a_full_disk_leaves_the_previous_checkpoint(store, reference, tmpfs, tally):
    disk = tmpfs("disk", 100)
    run_dir = disk / "run"
    ballast = [("Ballast", {"megabytes": MEGABYTES})]
    run = start(run_dir, store, "--trainer.callbacks.init_args.keep_all=false", inject=ballast)
    code, said = run.wait(), run.said()
    assert code == 1
    assert_named(said)
    assert last(run_dir)["global_step"] == 4
    assert max(losses(run_dir)) == 8
    assert not list(run_dir.rglob("*.tmp"))
    finish(run_dir, store, "--ckpt_path", "last", "--trainer.callbacks.init_args.keep_all=false")
    tally("full disk", [same_training(run_dir, reference)])


def test_a_disk_that_is_full_in_the_middle_of_a_save(store, reference, tmpfs, tally):
    """Nobody can tell before how much plain data will be: the file system itself ends the save."""
    disk = tmpfs("disk", 40)
    run_dir = disk / "run"
    option = "--trainer.callbacks.init_args.keep_all=false"
    fat = [("PlainBallast", {"megabytes": 60})]
    fault = {"batch": 7, "phase": "start", "kill": True}
    assert start(run_dir, store, option, inject=[("Fail", fault)]).wait() == -9
    run = start(run_dir, store, option, "--ckpt_path", "last", inject=fat)
    code, said = run.wait(), run.said()
    need, have = map(float, NO_SPACE.search(said).groups())
    assert code == 1 and 0 < have <= need + 1 and "Traceback" not in said, said
    assert last(run_dir)["global_step"] == 4
    assert not list(run_dir.rglob("*.tmp"))
    finish(run_dir, store, option, "--ckpt_path", "last")
    tally("disk full in the middle of a save", [same_training(run_dir, reference)])


@pytest.mark.short
def test_a_file_size_limit_during_the_save_leaves_the_previous_checkpoint(
    store, reference, tmp_path, tally
):
    """The space is there when the save begins; a limit ends it in the middle."""
    run_dir = tmp_path / "run"
    run = start(run_dir, store, inject=[("Ballast", {"megabytes": MEGABYTES}),
                                        ("LimitFiles", {"megabytes": 10, "batch": 7})])  # fmt: skip
    code, said = run.wait(), run.said()
    assert code == 1 and "could not be written" in said and "Traceback" not in said
    assert last(run_dir)["global_step"] == 4
    assert not list(run_dir.rglob("*.tmp"))
    finish(run_dir, store, "--ckpt_path", "last")
    tally("file-size limit in the middle of a save", [same_training(run_dir, reference)])
