"""Starting toy runs as processes of their own, and reading what they left behind."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import toy
import yaml

from peagle.serve.server import free_port

HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]
CONFIG = HERE / "toy.yaml"
TIMEOUT_S = 600
SHORT = os.environ.get("PEAGLE_FAULTS") == "short"
AT_ONCE = int(os.environ.get("PEAGLE_FAULTS_AT_ONCE", os.cpu_count() or 2))  # one thread each
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}{os.pathsep}{HERE}",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
}

# Importing takes seconds, so it is done once, in a process from which the runs are forked.
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["toy"])


def some(full: int, short: int) -> int:
    """How often to repeat something."""
    return short if SHORT else full


class Run:
    """A running ``fit``, ``validate``, ... of one or more processes, each group in a session."""

    def __init__(self, processes: list, log: Path):
        self.processes, self.log = processes, log

    @property
    def pid(self) -> int:
        return self.processes[0].pid

    def wait(self, seconds: float = TIMEOUT_S) -> int:
        """Exit code of the first rank, negative for a signal; a run that hangs is killed: -9."""
        end = time.monotonic() + seconds
        while self.alive() and time.monotonic() < end:
            time.sleep(0.01)
        if self.alive():
            with self.log.open("a") as file:
                file.write("killed by the test: it did not end in time\n")
        for process in self.processes:
            if status_of(process) is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.join() if hasattr(process, "join") else process.wait()
        return status_of(self.processes[0])

    def until(self, condition, seconds: float = TIMEOUT_S) -> None:
        """Wait for something that the run does."""
        end = time.monotonic() + seconds
        while not condition():
            assert self.alive(), f"the run ended too early:\n{self.said()}"
            assert time.monotonic() < end, f"the run takes too long:\n{self.said()}"
            time.sleep(0.01)

    def alive(self) -> bool:
        return any(status_of(process) is None for process in self.processes)

    def said(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def status_of(process) -> int | None:
    """Exit code of a process that was forked or launched; ``None`` while it runs."""
    return process.poll() if isinstance(process, subprocess.Popen) else process.exitcode


def forked(arguments: list[str], log: Path, environment: dict[str, str]):
    os.environ["PYTHONPATH"] = ENVIRONMENT["PYTHONPATH"]  # for the process that forks
    process = _forks.Process(target=toy.as_process, args=(arguments, environment, str(log)))
    process.start()
    return process


def launched(arguments: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    with open(log, "ab") as file:
        return subprocess.Popen(
            [sys.executable, str(HERE / "toy.py"), *arguments],
            env=os.environ | environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def write_config(
    run_dir: Path, inject: Iterable[tuple[str, dict[str, Any]]], every_n_steps: int
) -> Path:
    """The toy configuration with injected callbacks, beside the run's folder."""
    config = yaml.safe_load(CONFIG.read_text())
    callbacks = config["trainer"]["callbacks"]
    callbacks[-1]["init_args"]["every_n_steps"] = every_n_steps
    # Injections come first: what they do happens before the callbacks under test act.
    callbacks[:0] = [{"class_path": f"injections.{n}", "init_args": a} for n, a in inject]
    path = run_dir.with_name(f"{run_dir.name}-{time.monotonic_ns()}.json")
    path.write_text(json.dumps(config))
    return path


def start(
    run_dir: Path,
    store: Path,
    *options: str,
    command: str = "fit",
    inject: Iterable[tuple[str, dict[str, Any]]] = (),
    every_n_steps: int = 4,
    ranks: int = 1,
    launch: bool = False,
    environment: dict[str, str] | None = None,
) -> Run:
    """Start the toy run.

    Args:
        inject: callbacks of ``injections.py`` and their arguments.
        ranks: more than one run under DDP.
        launch: start as a user does, and let Lightning start the other ranks; this takes longer.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    path = write_config(run_dir, inject, every_n_steps)
    arguments = [command, "--config", str(path), "--run_dir", str(run_dir), "--store", str(store)]
    if ranks > 1:
        arguments += [f"--trainer.devices={ranks}", "--trainer.strategy=ddp"]
    arguments += options
    log = run_dir.with_name(run_dir.name + ".log")
    environment = ENVIRONMENT | (environment or {})
    if launch:
        return Run([launched(arguments, log, environment)], log)
    if ranks == 1:
        return Run([forked(arguments, log, environment)], log)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "NODE_RANK": "0"}
    return Run(
        [
            forked(arguments, log, environment | address | {"LOCAL_RANK": str(rank)})
            for rank in range(ranks)
        ],
        log,
    )


def start_command(folder: Path, *arguments: Any) -> Run:
    """Start any other command of ``python -m peagle``."""
    log = folder / "log"
    return Run([forked(list(map(str, arguments)), log, ENVIRONMENT)], log)


def finish(*args, **kwargs) -> Run:
    """Start a run and insist that it ends well."""
    run = start(*args, **kwargs)
    code = run.wait()
    assert code == 0, f"exit code {code}:\n{run.said()}"
    return run


def each(function, items: Iterable) -> list:
    """Several at a time, each in a process of its own."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(function, items))


def lines(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text().splitlines()]


def losses(run_dir: Path, rank: int = 0) -> dict[int, set[str]]:
    """Every loss that was ever computed for a batch: one value, however often it was repeated."""
    found: dict[int, set[str]] = {}
    for number, loss in lines(run_dir / f"losses-{rank}.txt"):
        found.setdefault(int(number), set()).add(loss)
    return found


def last(run_dir: Path, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(run_dir / "checkpoints" / name, weights_only=True)


def same(ours: Any, theirs: Any) -> bool:
    """Bitwise equality of nested states."""
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(same, ours, theirs))
    return ours == theirs


def same_training(run_dir: Path, reference: Path) -> str:
    """Empty when weights, optimizer, schedule and every loss equal the reference to the bit."""
    ours, theirs = last(run_dir), last(reference)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "progress"):
        if not same(ours[key], theirs[key]):
            return f"{key} differs"
    wanted = losses(reference)
    found = losses(run_dir)
    different = [n for n, values in found.items() if values != wanted.get(n)]
    if different or max(found) != max(wanted):
        return f"losses differ in batches {different[:5]}"
    return ""
