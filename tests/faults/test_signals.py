"""SIGTERM and Ctrl-C, to whichever process: a checkpoint within a step, 143 or 130, no hang."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import (
    ENVIRONMENT,
    finish,
    last,
    lines,
    losses,
    same_training,
    start,
    write_config,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
GRACE_S = 30.0  # from the signal to the end, on a busy machine
STEP_S = 0.3


@pytest.fixture(scope="module")
def two_ranks(store, tmp_path_factory) -> Path:
    """The uninterrupted run of two ranks."""
    run_dir = tmp_path_factory.mktemp("signals") / "whole"
    finish(run_dir, store, ranks=2)
    return run_dir


def steps(run_dir: Path) -> int:
    path = run_dir / "losses-0.txt"
    return len(lines(path)) if path.exists() else 0


def child_of(pid: int) -> int:
    """The process that Lightning started for the second rank."""
    out = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=True)
    (child,) = map(int, out.stdout.split())
    return child


def send(run, to: str, number: int) -> None:
    if to == "all":
        os.killpg(run.pid, number)
    else:
        os.kill(run.pid if to == "first" else child_of(run.pid), number)


def end_of(run, to: str, number: int) -> str:
    """Send a signal after some steps; what is wrong with how the run ends."""
    run_dir = Path(run.log).with_suffix("")
    run.until(lambda: steps(run_dir) >= 3)
    before, sent = steps(run_dir), time.monotonic()
    send(run, to, number)
    code = run.wait(GRACE_S)
    took = time.monotonic() - sent
    saved = last(run_dir)["global_step"] if (run_dir / "checkpoints/last.ckpt").exists() else 0
    # One step may have been under way at the count, and another at the signal.
    if code != 128 + number or not before <= saved <= before + 2:
        said = run.said()[-800:]
        return f"{to}: exit code {code} after {took:.1f} s, step {saved} after {before}:\n{said}"
    return ""


@pytest.mark.parametrize("to", ["first", "second", "all"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_two_ranks(store, two_ranks, tmp_path, tally, to, number):
    run_dir = tmp_path / "run"
    slow = [("Slow", {"seconds": STEP_S})]
    run = start(run_dir, store, ranks=2, launch=True, inject=slow, every_n_steps=1000)
    problem = end_of(run, to, number)
    if not problem:
        finish(run_dir, store, "--ckpt_path", "last", ranks=2)
        problem = same_training(run_dir, two_ranks)
    tally(f"{signal.Signals(number).name}, two ranks, to {to}", [problem])


@pytest.mark.short
@pytest.mark.parametrize("workers", [0, 2])
def test_a_signal_to_the_whole_process_group(store, reference, tmp_path, tally, workers):
    run_dir = tmp_path / "run"
    slow = [("Slow", {"seconds": STEP_S})]
    run = start(run_dir, store, f"--data.num_workers={workers}", inject=slow, every_n_steps=1000)
    problem = end_of(run, "all", signal.SIGTERM)
    if not problem:
        finish(run_dir, store, "--ckpt_path", "last")
        problem = same_training(run_dir, reference)
    tally(f"SIGTERM to the process group, {workers} workers", [problem])


@pytest.mark.short
def test_a_signal_during_validation(store, reference, tmp_path, tally):
    run_dir = tmp_path / "run"
    slow = [("Slow", {"seconds": 0.0, "validation_seconds": 0.5})]
    run = start(run_dir, store, inject=slow, every_n_steps=1000)
    run.until((run_dir / "validating-0.txt").exists)
    os.kill(run.pid, signal.SIGTERM)
    assert run.wait(GRACE_S) == 143
    assert len(lines(run_dir / "validating-0.txt")) <= 2
    assert last(run_dir)["global_step"] == 25
    finish(run_dir, store, "--ckpt_path", "last")
    tally("SIGTERM during validation", [same_training(run_dir, reference)])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_run_at_once(store, tmp_path, tally, number, code):
    run_dir = tmp_path / "run"
    run = start(run_dir, store, inject=[("Slow", {"seconds": 60.0})])
    run.until((run_dir / "sleeping-0.txt").exists)
    os.kill(run.pid, number)
    run.until(lambda: "ending after this step" in run.said())
    sent = time.monotonic()
    os.kill(run.pid, number)
    ended = run.wait(GRACE_S)
    took = time.monotonic() - sent
    problem = "" if ended == code and took < 5 else f"exit code {ended} after {took:.1f} s"
    tally(f"second {signal.Signals(number).name}", [problem])


def test_a_signal_to_the_agent_of_torchrun(store, two_ranks, tmp_path, tally):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    script = Path(__file__).with_name("toy.py")
    config = write_config(run_dir, [("Slow", {"seconds": STEP_S})], 1000)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script,
        "fit", "--config", config, "--run_dir", run_dir, "--store", store, "--trainer.devices=2",
        "--trainer.strategy=ddp",
    ]  # fmt: skip
    with open(tmp_path / "log", "wb") as log:
        agent = subprocess.Popen(
            list(map(str, command)), env=os.environ | ENVIRONMENT, stdout=log, stderr=log
        )
    deadline = time.monotonic() + 300
    while steps(run_dir) < 2 and agent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    agent.send_signal(signal.SIGTERM)
    code = agent.wait(60)
    saved = last(run_dir)["global_step"]
    done = max(losses(run_dir))
    finish(run_dir, store, "--ckpt_path", "last", ranks=2)
    problem = same_training(run_dir, two_ranks)
    if code == 0 or saved != done:
        problem += f" exit code {code}, step {saved} of {done}: {(tmp_path / 'log').read_text()}"
    tally("SIGTERM to the agent of torchrun", [problem])
