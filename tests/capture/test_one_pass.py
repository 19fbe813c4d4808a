"""Answers and states from an engine: what it is asked, and what becomes of it when it fails.

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

import numpy as np
import pytest
import torch

from peagle.capture.asker import Asker, Question
from peagle.capture.capture import capture
from peagle.capture.config import CaptureConfig
from peagle.capture.engine_request import ask
from peagle.capture.engines import Engine, Engines, running_engines, serving
from peagle.capture.identity import wanted_manifest
from peagle.capture.prompts import Prompt, PromptSource
from peagle.serve.server import EngineError
from peagle.serve.vllm import find_vllm, serve
from peagle.store.manifest import Manifest
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
CONFIG_OF_TRANSFORMERS = replace(CONFIG, engine="transformers")


def served_by(vllm, **changes):
    return replace(CONFIG, vllm_python=vllm.python, **changes)


def ids_of(folder):
    return [answer["id"] for answer in answers_in(folder)]


def answers_in(folder):
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def asked_for_answers(vllm):
    """Its requests for answers since this was last called, without the check at its start."""
    return [r for r in vllm.asked() if "kv_transfer_params" in r and "logprobs" not in r]


def test_no_layers_are_loaded_and_nothing_of_the_engine_is_left(stand_in, tmp_path, monkeypatch):
    vllm, load, layers = stand_in(), TargetSource.model, []

    def loading(*args, config, **options):
        layers.append(config.num_hidden_layers)
        return load(*args, config=config, **options)

    monkeypatch.setattr(TargetSource, "model", loading)
    capture(TARGET, served_by(vllm), tmp_path / "store")
    assert vllm.served and vllm.gone() and layers == [0]
    assert len(Store(tmp_path / "store")) == 9
    assert not list((tmp_path / "store").glob("partial*"))


def test_a_sample_has_the_states_that_were_handed_out_and_none_for_its_last_token(
    stand_in, tmp_path
):
    capture(TARGET, served_by(stand_in()), tmp_path / "store")
    store = Store(tmp_path / "store")
    answers = {tuple(a["turns"][0][0] + a["turns"][0][1]) for a in answers_in(tmp_path / "store")}
    for number in range(len(store)):
        sample = store.read(number)
        tokens = sample.input_ids.tolist()
        assert tuple(tokens) in answers
        rows = [np.random.default_rng(t + 1000 * i).normal(size=(3, 192))
                for i, t in enumerate(tokens[:-1])]  # fmt: skip
        wanted = torch.tensor(np.array(rows)).to(torch.float32).to(torch.bfloat16)
        assert torch.equal(sample.aux[:-1], wanted[:, :2].flatten(1))
        assert torch.equal(sample.final[:-1], wanted[:, 2])
        assert not sample.aux[-1].any() and not sample.final[-1].any()


def test_each_request_says_how_the_answer_is_drawn_and_where_it_ends(stand_in, tmp_path):
    vllm = stand_in()
    capture(TARGET, served_by(vllm), tmp_path / "store")
    asked, greedy = asked_for_answers(vllm), []
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
    whole = asked_for_answers(vllm)
    for part in ("1/2", "0/2"):
        capture(TARGET, served_by(vllm, part=part), tmp_path / "shared")
    order = json.dumps
    assert sorted(asked_for_answers(vllm), key=order) == sorted(whole, key=order)
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
    assert len(asked_for_answers(vllm)) == 7
    assert ids_of(store)[:2] == kept and len(set(ids_of(store))) == len(ids_of(store)) == 9
    capture(TARGET, served_by(vllm), store)  # finds it complete
    assert not Path(vllm.python).with_name("asked").exists()


def test_a_capture_goes_on_with_another_engine(stand_in, tmp_path):
    vllm, store = stand_in("dies after two answers"), tmp_path / "store"
    with pytest.raises(EngineError):
        capture(TARGET, served_by(vllm), store)
    kept = (store / "answers.jsonl").read_bytes()
    capture(TARGET, CONFIG_OF_TRANSFORMERS, store)
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
        ({"engine": "transformers", "servers": ["http://a:1"]}, "need engine: vllm"),
        ({"engine": "vllm", "speculators": "folder"}, "vllm would not be asked"),
        ({"servers": ["http://a:1"], "vllm_python": "python"}, "servers already run"),
        ({"vllm_args": ["--enable-prefix-caching"]}, "without --enable-prefix-caching only"),
        ({"vllm_args": ["-pp", "2"]}, "without -pp only"),
    ],
)
def test_settings_of_an_engine_that_would_not_be_asked_are_refused(settings, said):
    with pytest.raises(ValueError, match=said):
        replace(CONFIG, **settings)


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("takes text from its cache", "hands out other hidden states when it reads a text again"),
        ("hands out constants", "the same at every token"),
        ("hands out other tokens", "are of other tokens than it was asked"),
        ("hands out nothing", "hands out no hidden states: start it with extract_hidden_states"),
        ("writes to another folder", "which is not to be seen here"),
        ("serves another model", "it serves another model than this target"),
    ],
)
def test_states_that_are_not_the_targets_are_refused_before_the_first_answer(
    stand_in, tmp_path, behaviour, words
):
    vllm = stand_in(behaviour)
    with pytest.raises(ValueError, match=words):
        capture(TARGET, served_by(vllm), tmp_path / "store")
    assert vllm.gone() and not (tmp_path / "store" / "answers.jsonl").exists()


def test_an_engine_that_cannot_hand_out_states_is_refused_before_it_starts(stand_in, tmp_path):
    vllm = stand_in(writes_states=False)
    with pytest.raises(ValueError, match="cannot hand out hidden states"):
        capture(TARGET, served_by(vllm), tmp_path / "store")
    assert not vllm.served


def test_a_target_with_latent_attention_is_refused_before_it_starts(
    stand_in, tmp_path, monkeypatch
):
    text = TARGET.config()
    text.kv_lora_rank = 512
    monkeypatch.setattr(TargetSource, "config", lambda target: text)
    vllm = stand_in()
    with pytest.raises(ValueError, match=r"no hidden states of targets with latent attention"):
        capture(TARGET, served_by(vllm), tmp_path / "store")
    assert not vllm.served


def test_answers_in_the_data_are_read_and_nothing_is_asked(stand_in, tmp_path):
    path, vllm = tmp_path / "talks.jsonl", stand_in()
    rows = [
        {"messages": [{"role": "user", "content": f"def f{i}():"},
                      {"role": "assistant", "content": f"    return {i}"}]}
        for i in range(8)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = served_by(vllm, prompts=[PromptSource(str(path))], regenerate=False)
    capture(TARGET, config, tmp_path / "store")
    assert asked_for_answers(vllm) == []
    capture(TARGET, replace(config, engine="transformers", vllm_python=None), tmp_path / "own")
    ours, theirs = (Store(tmp_path / name) for name in ("store", "own"))
    assert [e.sample for e in ours.entries] == [e.sample for e in theirs.entries]
    for number in range(8):
        for name in ("input_ids", "loss_mask"):
            read = [getattr(store.read(number), name) for store in (ours, theirs)]
            assert torch.equal(*read)


def test_prompts_that_leave_no_room_are_not_asked_and_answers_only_for_the_room(
    stand_in, tmp_path, capsys
):
    path, vllm = tmp_path / "mine.jsonl", stand_in()
    path.write_text('{"prompt": "def a():"}\n' + json.dumps({"prompt": "x = 1\n" * 99}) + "\n")
    config = served_by(vllm, prompts=[PromptSource(str(path))], max_tokens=60, max_new_tokens=512)
    capture(TARGET, config, tmp_path / "store")
    assert "1 of 2 prompts are longer than max_tokens" in capsys.readouterr().out
    [request] = asked_for_answers(vllm)
    assert len(request["prompt"]) + request["max_tokens"] == 60
    assert len(Store(tmp_path / "store").read(0).input_ids) == 60


def test_which_engine_answered_makes_no_other_store():
    """The identity of stores that exist stays what it was before there was a choice."""
    source = PromptSource("HuggingFaceH4/ultrachat_200k", "train_sft", "messages", limit=100)
    before = CaptureConfig(prompts=[source])
    assert before.answers_hash() == "ee906bef3288a145"
    other = replace(before, engine="vllm", vllm_python="/env/bin/python", vllm_args=["--seed", "1"])
    assert other.answers_hash() == "ee906bef3288a145"


def test_a_store_says_what_ran_the_target_and_other_roundings_are_refused(stand_in, tmp_path):
    config, folder = served_by(stand_in()), tmp_path / "store"
    capture(TARGET, config, folder)
    engine = {"name": "vllm", "version": "0.32.0", "quantization": None, "kv_cache_dtype": "auto"}
    assert Manifest.read(folder).engine == engine
    capture(TARGET, CONFIG_OF_TRANSFORMERS, folder)  # differs by rounding alone
    for argument, name in (("--quantization=fp8", "fp8"), ("--kv-cache-dtype=fp8", "fp8")):
        with pytest.raises(ValueError, match=f"captured with engine = .*this run needs .*{name}"):
            capture(TARGET, replace(config, vllm_args=[argument]), folder)


def test_the_record_of_a_store_does_not_say_where_vllm_lives(stand_in, tmp_path):
    vllm = stand_in()
    capture(TARGET, served_by(vllm), tmp_path / "store")
    record = json.loads((tmp_path / "store" / "capture.json").read_text())
    assert record["engine"] == "vllm" and record["vllm_python"] is None
    assert record["servers"] == []


def test_a_capture_that_goes_on_with_another_engine_says_so(stand_in, tmp_path, capsys):
    store, dying = tmp_path / "store", stand_in("dies after two answers", version="0.31.0")
    with pytest.raises(EngineError):
        capture(TARGET, served_by(dying), store)
    assert "begun with" not in capsys.readouterr().err
    capture(TARGET, served_by(stand_in()), store)
    assert "begun with vllm 0.31.0, goes on with vllm 0.32.0" in capsys.readouterr().err
    assert Manifest.read(store).engine["version"] == "0.31.0"


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
    content = {"choices": [choice], "kv_transfer_params": {"hidden_states_path": "/path"}}
    with answering(status, json.dumps(content).encode()) as port:
        reply = ask(port, [5, 6], max_new_tokens=3, temperature=0.0, seed=1, ends={2, 9})
        return reply.tokens


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
        ask(port, [5], max_new_tokens=3, temperature=0.0, seed=1, ends={2})


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
        ask(port, [5], max_new_tokens=3, temperature=0.0, seed=1, ends={2})


def test_a_prompt_that_the_engine_refuses_is_named():
    content = json.dumps({"error": {"message": "no such token"}}).encode()
    with answering(400, content) as port:
        asker = Asker(Engines([Engine(port)]), TARGET, CONFIG, wanted_manifest(TARGET, CONFIG))
        with pytest.raises(
            ValueError, match=r"prompt mine/7: the engine refuses .*: no such token"
        ):
            asker.settle(Question(Prompt("mine/7", None, ("def a():",)), greedy=True))


@contextmanager
def running(stand_in, behaviour, folder) -> Iterator[str]:
    """The address of an engine that somebody else has started."""
    folder.mkdir()
    vllm = find_vllm(stand_in(behaviour).python)
    served = serving(TARGET, CONFIG, vllm, wanted_manifest(TARGET, CONFIG), folder)
    with serve(vllm, served, timeout_s=60.0) as server:
        yield f"http://127.0.0.1:{server.port}"


def test_what_a_dying_server_lost_is_asked_of_another_one(stand_in, tmp_path, capsys):
    """Several servers share the work; the store is that of one."""
    with running(stand_in, "dies after two answers", tmp_path / "a") as dying:
        with running(stand_in, "", tmp_path / "b") as well:
            capture(TARGET, replace(CONFIG, servers=[dying, well]), tmp_path / "store")
    assert "what it was asked is asked again" in capsys.readouterr().out
    capture(TARGET, served_by(stand_in()), tmp_path / "whole")
    shared, whole = (Store(tmp_path / name) for name in ("store", "whole"))
    assert [e.hashes for e in shared.entries] == [e.hashes for e in whole.entries]
    assert not [*(tmp_path / "b").iterdir()]


def test_turns_that_follow_an_answer_without_an_end_are_counted(stand_in, tmp_path, capsys):
    """The stand-in's answers end where ``max_new_tokens`` cuts them off."""
    path = tmp_path / "talks.jsonl"
    rows = [{"turns": [f"def f{i}():", "and then?"]} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    capture(TARGET, served_by(stand_in(), prompts=[PromptSource(str(path))]), tmp_path / "store")
    assert "8 of 8 conversations stop at an answer that max_new_t" in capsys.readouterr().out


@pytest.mark.parametrize("url", ["10.0.0.1:8000", "https://host:8000", "http://host:8000/v1"])
def test_a_server_must_be_given_by_host_and_port(url):
    with pytest.raises(ValueError, match="must be given as http://HOST:PORT"):
        running_engines([url])


def test_a_server_that_does_not_answer_is_named():
    with pytest.raises(ValueError, match=r"no engine answers at http://127\.0\.0\.1:9 "):
        running_engines(["http://127.0.0.1:9"])
