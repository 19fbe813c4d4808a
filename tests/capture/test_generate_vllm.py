"""Answers from an engine: what it is asked, and what becomes of a capture when it fails.

The engine here is a stand-in, which dies when it is told to; the real one is asked in
``tests/vllm/test_answers.py``.
"""

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch

from peagle.capture.capture import capture
from peagle.capture.config import CaptureConfig
from peagle.capture.generate_vllm import Client, request_completion
from peagle.capture.prompts import Prompt, PromptSource
from peagle.serve.server import EngineError
from peagle.store.reader import Store
from peagle.target.end_tokens import end_tokens
from peagle.target.target import TargetSource

TARGET = TargetSource("tiny")
CONFIG = CaptureConfig(
    prompts=[PromptSource("stdlib", limit=9)],
    engine="vllm",
    max_new_tokens=8,
    batch_size=2,
    greedy_share=0.4,
    temperature=0.7,
    val_share=0.3,
)


def served_by(vllm, **changes):
    return replace(CONFIG, vllm_python=vllm.python, **changes)


def ids_of(folder):
    return [answer["id"] for answer in answers_in(folder)]


def answers_in(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_the_engine_is_gone_before_the_target_is_loaded(stand_in, tmp_path, monkeypatch):
    vllm, load = stand_in(), TargetSource.model
    left = []

    def loading(*args, **options):
        left.append(vllm.processes())
        return load(*args, **options)

    monkeypatch.setattr(TargetSource, "model", loading)
    capture(TARGET, served_by(vllm), tmp_path / "store")
    assert vllm.served and left == [[]]
    assert len(Store(tmp_path / "store")) == 9


def test_each_request_says_how_the_answer_is_drawn_and_where_it_ends(stand_in, tmp_path):
    vllm = stand_in()
    capture(TARGET, served_by(vllm), tmp_path / "store")
    asked, greedy = vllm.asked(), []
    for answer in answers_in(tmp_path / "store"):
        [request] = [r for r in asked if r["prompt"] == answer["turns"][0][0]]
        assert request["temperature"] == (0.0 if answer["greedy"] else 0.7)
        greedy.append(answer["greedy"])
    assert len(asked) == 9 and set(greedy) == {True, False}
    assert len({request["seed"] for request in asked}) == 9
    for request in asked:
        assert (request["top_p"], request["top_k"], request["repetition_penalty"]) == (1.0, 0, 1.0)
        assert (request["max_tokens"], request["stop_token_ids"]) == (8, [2])
        assert request["return_token_ids"] is True


def test_parts_ask_what_one_process_asks(stand_in, tmp_path):
    vllm = stand_in()
    capture(TARGET, served_by(vllm), tmp_path / "whole")
    whole = vllm.asked()
    for part in ("1/2", "0/2"):
        capture(TARGET, served_by(vllm, part=part), tmp_path / "shared")
    order = json.dumps
    assert sorted(vllm.asked(), key=order) == sorted(whole, key=order)
    stores = [Store(tmp_path / name) for name in ("whole", "shared")]
    names = [[entry.sample for entry in store.entries] for store in stores]
    assert names[0] == names[1] and len(names[0]) == 9


def test_an_engine_that_dies_leaves_the_answers_before_it_and_the_next_is_asked_the_rest(
    stand_in, tmp_path
):
    vllm, store = stand_in("dies after two answers"), tmp_path / "store"
    with pytest.raises(EngineError, match="died while it was asked; its last lines:\nEngineDead"):
        capture(TARGET, served_by(vllm), store)
    assert vllm.gone()
    kept = ids_of(store)
    assert len(kept) == 2
    with open(store / "answers.jsonl", "a") as file:
        file.write('{"id": "torn')
    vllm.asked()
    vllm = stand_in()
    capture(TARGET, served_by(vllm), store)
    assert len(vllm.asked()) == 7
    assert ids_of(store)[:2] == kept and len(set(ids_of(store))) == len(ids_of(store)) == 9
    capture(TARGET, served_by(vllm), store)  # finds it complete
    assert not Path(vllm.python).with_name("asked").exists()


def test_a_capture_goes_on_with_another_engine(stand_in, tmp_path):
    vllm, store = stand_in("dies after two answers"), tmp_path / "store"
    with pytest.raises(EngineError):
        capture(TARGET, served_by(vllm), store)
    kept = (store / "answers.jsonl").read_bytes()
    capture(TARGET, replace(CONFIG, engine="transformers"), store)
    assert (store / "answers.jsonl").read_bytes().startswith(kept)
    assert len(Store(store)) == len(set(ids_of(store))) == len(ids_of(store)) == 9


def test_an_interpreter_without_vllm_is_refused_before_the_target_is_loaded(tmp_path, monkeypatch):
    monkeypatch.delattr(TargetSource, "model")
    with pytest.raises(ValueError, match=r"has no vLLM: install .*: --capture\.vllm_python PATH"):
        capture(TARGET, replace(CONFIG, vllm_python=sys.executable), tmp_path / "store")


def test_a_vllm_that_does_not_know_the_target_is_refused_before_it_starts(stand_in, tmp_path):
    vllm = stand_in(architectures=["MambaForCausalLM"])
    with pytest.raises(ValueError, match="does not know the architecture LlamaForCausalLM"):
        capture(TARGET, served_by(vllm), tmp_path / "store")
    assert not vllm.served


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"engine": "transformers", "vllm_args": ["--seed", "1"]}, "need engine: vllm"),
        ({"engine": "transformers", "vllm_python": "python"}, "need engine: vllm"),
        ({"engine": "vllm", "regenerate": False}, "engine: vllm is for answers"),
        ({"engine": "vllm", "speculators": "folder"}, "engine: vllm is for answers"),
    ],
)
def test_settings_of_an_engine_that_would_not_be_asked_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        replace(CONFIG, **settings)


def test_conversations_longer_than_the_target_knows_are_refused_before_it_starts(
    stand_in, tmp_path
):
    vllm = stand_in()
    with pytest.raises(ValueError, match=r"max_tokens = 9999 exceeds the \d+ positions"):
        capture(TARGET, served_by(vllm, max_tokens=9999), tmp_path / "store")
    assert not vllm.served


def test_prompts_that_leave_no_room_are_not_asked_and_answers_only_for_the_room(
    stand_in, tmp_path, capsys
):
    path, vllm = tmp_path / "mine.jsonl", stand_in()
    path.write_text('{"prompt": "def a():"}\n' + json.dumps({"prompt": "x = 1\n" * 99}) + "\n")
    config = served_by(vllm, prompts=[PromptSource(str(path))], max_tokens=60, max_new_tokens=512)
    capture(TARGET, config, tmp_path / "store")
    assert "1 of 2 prompts are longer than max_tokens" in capsys.readouterr().out
    [request] = vllm.asked()
    assert len(request["prompt"]) + request["max_tokens"] == 60
    assert len(Store(tmp_path / "store").read(0).input_ids) == 60


def test_which_engine_answered_makes_no_other_store():
    """The identity of stores that exist stays what it was before there was a choice."""
    source = PromptSource("HuggingFaceH4/ultrachat_200k", "train_sft", "messages", limit=100)
    before = CaptureConfig(prompts=[source])
    assert before.answers_hash() == "ee906bef3288a145"
    other = replace(before, engine="vllm", vllm_python="/env/bin/python", vllm_args=["--seed", "1"])
    assert other.answers_hash() == "ee906bef3288a145"


def test_the_record_of_a_store_does_not_say_where_vllm_lives(stand_in, tmp_path):
    vllm = stand_in()
    capture(TARGET, served_by(vllm), tmp_path / "store")
    record = json.loads((tmp_path / "store" / "capture.json").read_text())
    assert record["engine"] == "vllm" and record["vllm_python"] is None


@pytest.mark.parametrize("ends", [7, [7, 2]])
@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
def test_the_tokens_that_end_an_answer_are_known_without_loading_the_target(tmp_path, name, ends):
    folder = tmp_path / "target"
    shutil.copytree(TARGET.path, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    if name == "config.json":
        (folder / "generation_config.json").unlink()
    settings = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**settings, "eos_token_id": ends}))
    source = TargetSource(str(folder))
    tokenizer = source.tokenizer()
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(5)  # vLLM stops there too
    tokenizer.save_pretrained(folder)
    wanted = {7, 5} if ends == 7 else {7, 2, 5}
    assert source.end_tokens() == wanted
    model = source.model(dtype=torch.float32, device="cpu")
    assert end_tokens(model, source.tokenizer()) == wanted


@contextmanager
def answering(status: int, content: bytes) -> Iterator[int]:
    """The port of a server that answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *args):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield server.server_port
        finally:  # it would spin on its closed socket, and slow down every test after this one
            server.shutdown()


def asked(status: int, **choice) -> list[int]:
    with answering(status, json.dumps({"choices": [choice]}).encode()) as port:
        return request_completion(
            port, [5, 6], max_new_tokens=3, temperature=0.0, seed=1, ends={2, 9}
        )


def test_an_answer_is_whole_when_it_ends_or_is_as_long_as_allowed():
    assert asked(200, token_ids=[4, 9]) == [4, 9]
    assert asked(200, token_ids=[4, 5, 6]) == [4, 5, 6]


@pytest.mark.parametrize(
    ("choice", "kind", "words"),
    [
        ({"token_ids": [4, 5]}, OSError, "broke off an answer after 2 tokens"),
        ({"token_ids": []}, OSError, "broke off an answer after 0 tokens"),
        ({"text": "hello"}, ValueError, "returns text and no token ids: install vLLM"),
    ],
    ids=["too short", "empty", "text only"],
)
def test_an_answer_that_is_not_whole_is_none(choice, kind, words):
    with pytest.raises(kind, match=words):
        asked(200, **choice)


@pytest.mark.parametrize("content", [b"<html>", b"[]", b'{"choices": []}', b'{"choices": [1]}'])
def test_what_is_no_completion_is_said_to_be_none(content):
    with answering(200, content) as port, pytest.raises(OSError, match="and not a completion"):
        request_completion(port, [5], max_new_tokens=3, temperature=0.0, seed=1, ends={2})


@pytest.mark.parametrize(
    ("status", "kind", "words"),
    [
        (400, ValueError, "the engine refuses the request: too long"),
        (500, OSError, "the engine answered with status 500: too long"),
    ],
)
def test_what_the_engine_says_about_a_request_is_passed_on(status, kind, words):
    content = json.dumps({"error": {"message": "too long"}}).encode()
    with answering(status, content) as port, pytest.raises(kind, match=words):
        request_completion(port, [5], max_new_tokens=3, temperature=0.0, seed=1, ends={2})


def test_a_prompt_that_the_engine_refuses_is_named():
    content = json.dumps({"error": {"message": "no such token"}}).encode()
    with answering(400, content) as port:
        client = Client(port, TARGET.tokenizer(), {2}, CONFIG)
        with pytest.raises(
            ValueError, match=r"prompt mine/7: the engine refuses .*: no such token"
        ):
            client.converse(Prompt("mine/7", None, ("def a():",)), greedy=True)
