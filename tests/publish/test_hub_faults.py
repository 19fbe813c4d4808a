"""What the Hub or the machine does wrong: every publication still lands exactly once."""

import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import hub_runs
import pytest
from hub_fault_cases import FAULTS, RARE_FAULTS, Case
from hub_runs import REPO, finish_run, publish, queued
from hub_server import TOKEN, Hub

from peagle.publish.sender import PublishResult


@dataclass
class Outcome:
    """What a fault left after the first attempt, and after another with a healthy Hub."""

    result: PublishResult
    seconds: float
    commits: tuple[int, int]
    waiting: tuple[list[int], list[int]]
    tags: list[str]
    met: int


def meet_fault(run_dir: Path, case: Case) -> Outcome:
    finish_run(run_dir, step=3)
    with Hub() as hub:
        fault = hub.fault(case.route, **case.what)
        started = time.monotonic()
        result = publish(run_dir, hub.url, publish_timeout=case.patience)
        seconds = time.monotonic() - started
        landed, waiting = len(hub.history(REPO)), queued(run_dir)
        hub.faults.clear()
        publish(run_dir, hub.url)
        commits = (landed, len(hub.history(REPO)))
        waiting = (waiting, queued(run_dir))
        return Outcome(result, seconds, commits, waiting, [*hub.repos[REPO].tags], fault.met)


def meet_faults(faults: dict[str, Case], folders: pytest.TempPathFactory) -> dict[str, Outcome]:
    """Every fault at once: they wait more than they work."""
    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(5) as pool:
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        runs = [folders.mktemp("fault") for _ in faults]
        return dict(zip(faults, pool.map(meet_fault, runs, faults.values()), strict=True))


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    return meet_faults(FAULTS, tmp_path_factory)


@pytest.fixture(scope="module")
def rare_outcomes(tmp_path_factory):
    return meet_faults(RARE_FAULTS, tmp_path_factory)


def assert_one_commit(outcome: Outcome, case: Case) -> None:
    assert outcome.met >= min(case.what.get("times", 1), 2), "the fault never happened"
    assert outcome.commits == (int(case.lands), 1)
    assert outcome.waiting == ([] if case.lands else [3], [])
    assert outcome.result.complete == case.lands
    assert outcome.tags == ["step-3"]
    assert outcome.seconds < case.patience + 5


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_ends_in_one_commit_once_the_hub_is_well(outcomes, fault):
    assert_one_commit(outcomes[fault], FAULTS[fault])


@pytest.mark.slow
@pytest.mark.parametrize("fault", RARE_FAULTS)
def test_every_rarer_fault_ends_in_one_commit_too(rare_outcomes, fault):
    assert_one_commit(rare_outcomes[fault], RARE_FAULTS[fault])


def run_script(**task) -> subprocess.Popen:
    command = [sys.executable, hub_runs.__file__, json.dumps(task)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def kill(process: subprocess.Popen, *, sender_too: bool) -> None:
    """As the kernel does when memory runs out: no handler runs, nothing is flushed."""
    if process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.kill()
        for child in children if sender_too else []:
            os.kill(int(child), signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.slow
def test_kill_9_during_publish_mixes_duplicates_and_loses_nothing(hub, tmp_path):
    draw = random.Random(10)
    hub.fault("commit", hang=0.3, after=True)  # a wide window between done and answered
    weights, owed, moments = {}, set(), []
    for step in range(1, 11):
        weights[step] = finish_run(tmp_path, step=step)
        process = run_script(do="publish", run_dir=str(tmp_path), endpoint=hub.url)
        while (
            step not in queued(tmp_path) and process.poll() is None
        ):  # what is killed before is not yet being published
            time.sleep(0.001)
        expected = len(hub.requests) + draw.randint(1, 14)
        while len(hub.requests) < expected and process.poll() is None:
            time.sleep(0.005)
        if process.poll() is None:
            moments.append(hub.requests[-1][0])
        kill(process, sender_too=step % 2 == 0)
        owed |= {step, *queued(tmp_path)}
    assert len(moments) > 7 and len(set(moments)) > 2, "the kills came too late, or all at once"
    assert publish(tmp_path, hub.url).complete
    assert queued(tmp_path) == []
    steps = [int(re.search(r"step (\d+)", commit.title)[1]) for commit in hub.history(REPO)]
    assert sorted(steps) == sorted(owed)  # each once
    for commit, step in zip(hub.history(REPO), steps, strict=True):
        content = hub.content(REPO, commit.oid)
        found = hashlib.sha256(content["model.safetensors"]).hexdigest()
        assert found == weights[step] and weights[step][:12] in commit.title
        assert f"# Step {step}\n" in content["README.md"].decode()
        assert weights[step] in content["README.md"].decode()
        assert json.loads(content["provenance.json"])["step"] == step
        assert json.loads(content["metrics/validate.json"])["step"] == step
