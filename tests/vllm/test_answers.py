"""The real engine answers a capture's prompts: the target's own tokens and states."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from http_server import lasting, living, parent
from lab import ROOT, as_yaml

from peagle.capture.answers import read_answers
from peagle.capture.capture import capture
from peagle.capture.config import CaptureConfig
from peagle.capture.engines import serving
from peagle.capture.identity import wanted_manifest
from peagle.capture.prompts import PromptSource
from peagle.serve.vllm import find_vllm, serve
from peagle.store.reader import Store
from peagle.target.target import TargetSource

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]

TARGET = TargetSource("tiny")
SETTINGS = {
    "max_new_tokens": 24,
    "max_tokens": 200,
    "batch_size": 4,
    "greedy_share": 0.6,
    "temperature": 0.8,
    "dtype": "float32",  # in bf16 near ties go either way
    "val_share": 0.3,
}
WAITING = {"vllm_args": ["--max-num-seqs", "2"]}  # some answers come while others wait
LONG = "x = 1\n" * 200
TALKS = [
    ["def pop(self):", "def push(self, item):"],
    ["def add(a, b):", "def sub(a, b):"],
    ["def pop(self):", LONG],
    ["def close(self):", LONG],
]
PROMPTS = 20 + len(TALKS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("answers")
    rows = "".join(json.dumps({"turns": turns}) + "\n" for turns in TALKS)
    (folder / "talks.jsonl").write_text(rows)
    return folder


def prompts(folder):
    return [{"source": "stdlib", "limit": 20}, {"source": str(folder / "talks.jsonl")}]


def config_of(folder, **changes):
    sources = [PromptSource(**source) for source in prompts(folder)]
    return CaptureConfig(prompts=sources, **{**SETTINGS, **changes})


def answers_in(store):
    return {answer.id: answer for answer in read_answers(store / "answers.jsonl")}


@pytest.fixture(scope="module")
def served(folder, vllm_python, environment):
    """Answers of the engine."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        config = config_of(folder, engine="vllm", vllm_python=vllm_python, **WAITING)
        capture(TARGET, config, folder / "served")
    return answers_in(folder / "served")


@pytest.fixture(scope="module")
def own(folder):
    """What transformers answers to the same prompts, greedily."""
    capture(TARGET, config_of(folder, greedy_share=1.0), folder / "own")
    return answers_in(folder / "own")


def test_greedy_answers_are_those_of_transformers_token_for_token(served, own):
    answers = served
    greedy = [name for name, answer in answers.items() if answer.greedy]
    assert answers.keys() == own.keys() and len(own) == PROMPTS
    assert [answers[name] for name in greedy] == [own[name] for name in greedy]
    turns = [turn for name in greedy for turn in own[name].turns]
    assert sum(len(turn.answer) for turn in turns) > 150
    assert {own[name].finished for name in greedy} == {True, False}  # some ended by themselves


def test_sampled_answers_are_others_and_end_where_the_target_ends_them(served, own):
    sampled = {name: answer for name, answer in served.items() if not answer.greedy}
    for answer in sampled.values():
        for turn in answer.turns:
            assert 0 < len(turn.answer) <= 24 and 2 not in turn.answer[:-1]
        assert answer.finished == (answer.turns[-1].answer[-1] == 2)  # tiny's <|im_end|>
    others = [name for name, answer in sampled.items() if answer.turns != own[name].turns]
    assert len(others) > len(sampled) // 2 >= 3


def test_later_turns_are_asked_after_what_the_target_said_as_far_as_they_fit(served):
    talks = [answer for name, answer in served.items() if name.startswith("talks")]
    assert len(talks) == len(TALKS)
    tokenizer = TARGET.tokenizer()
    going_on = [answer.turns for answer in talks if len(answer.turns) > 1]
    for (_, first), (history, _) in going_on:
        said = tokenizer.decode(first, skip_special_tokens=True)
        assert len(said) > 10 and said in tokenizer.decode(history)
    assert going_on
    assert 1 in [len(answer.turns) for answer in talks if answer.cut]


def test_states_are_those_of_transformers_to_rounding(folder, served, own):
    """Of greedy conversations, which are the same; stored in bf16, a near tie flips one bit."""
    ours, theirs = Store(folder / "served"), Store(folder / "own")
    numbers = {entry.sample: number for number, entry in enumerate(theirs.entries)}
    names = {entry.sample.partition("-")[0] for entry in ours.entries}
    assert len(names) == PROMPTS  # some of several documents
    compared = 0
    for number, entry in enumerate(ours.entries):
        if entry.sample in numbers:
            one, other = ours.read(number), theirs.read(numbers[entry.sample])
            assert torch.equal(one.input_ids, other.input_ids)
            assert torch.equal(one.loss_mask, other.loss_mask)
            for name in ("aux", "final"):
                a, b = (getattr(sample, name)[:-1].float() for sample in (one, other))
                assert (a - b).norm() < 5e-4 * b.norm()
            compared += 1
    assert compared > PROMPTS // 3


def test_answers_in_the_data_are_read_by_servers_that_run_already(
    folder, vllm_python, environment, own
):
    """Conversations of several turns."""
    path = folder / "answered.jsonl"
    rows = [{"messages": answer.messages} for answer in own.values()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(config_of(folder), prompts=[PromptSource(str(path))], regenerate=False)
    capture(TARGET, config, folder / "two-passes")
    states = folder / "states"
    states.mkdir()
    vllm, wanted = find_vllm(vllm_python), wanted_manifest(TARGET, config)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        served = serving(TARGET, config, vllm, wanted, states)
        with serve(vllm, served, timeout_s=600.0) as server:
            servers = [f"http://127.0.0.1:{server.port}"]
            capture(TARGET, replace(config, engine="vllm", servers=servers), folder / "read")
    assert not list(states.iterdir())
    read, wanted = Store(folder / "read"), Store(folder / "two-passes")
    assert [e.sample for e in read.entries] == [e.sample for e in wanted.entries]
    for number in range(len(read)):
        one, other = read.read(number), wanted.read(number)
        assert torch.equal(one.input_ids, other.input_ids)
        assert (one.aux[:-1] - other.aux[:-1]).float().norm() < 5e-4 * other.aux.float().norm()


def test_a_capture_ended_by_a_kill_leaves_no_engine_and_asks_the_rest_with_the_same_outcome(
    folder, served, vllm_python, environment
):
    store, path = folder / "again", folder / "again" / "answers.jsonl"
    options = {**SETTINGS, **WAITING, "prompts": prompts(folder)}
    options |= {"engine": "vllm", "vllm_python": vllm_python}
    arguments = [f"--capture.{name}={as_yaml(value)}" for name, value in options.items()]
    command = [sys.executable, "-m", "peagle", "capture", "--config=configs/quickstart.yaml"]
    command += [f"--store={store}", "--target=tiny", *arguments]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    while len(lines_of(path)) < 3:
        assert process.poll() is None, (folder / "log").read_text()[-3000:]
        time.sleep(0.005)
    process.send_signal(signal.SIGSTOP)  # or it has all answers by the time of the kill
    [group] = children(process.pid)
    assert len(living(group)) > 2
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert lasting(group) == []
    kept = lines_of(path)
    assert 3 <= len(kept) < PROMPTS
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert lines_of(path)[: len(kept)] == kept and len(lines_of(path)) == PROMPTS
    known = f"{PROMPTS - len(kept)} prompts and {len(kept)} known answers"
    assert f"starting the engine for {known}" in ended.stderr
    assert not [*store.glob("**/states*")]
    assert answers_in(store) == served  # the sampled ones too


def children(process):
    numbers = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    return [number for number in numbers if parent(number) == process]


def lines_of(path):
    """Whole lines."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
