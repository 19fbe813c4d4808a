"""Capture with the real embedded target: what is stored is what the target computes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from random_parts import make_target

from peagle.capture import extract as extract_module
from peagle.capture.answers import generate_missing, read_answers, refuse_other_prompts
from peagle.capture.capture import capture
from peagle.capture.chat import prompt_ids
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Answer
from peagle.capture.generate import generate
from peagle.capture.identity import wanted_manifest
from peagle.capture.prompts import Prompt, PromptSource
from peagle.store.index import unfinished_files
from peagle.store.reader import Store
from peagle.target.head import TargetHead, target_head_of
from peagle.target.target import TargetSource

TARGET = TargetSource("tiny")
CONFIG = CaptureConfig(
    prompts=[PromptSource("stdlib", limit=6)],
    max_new_tokens=24,
    batch_size=4,
    dtype="float32",
    val_share=0.3,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("capture") / "store"
    capture(TARGET, CONFIG, folder)
    return folder


def test_the_store_holds_the_targets_hidden_states_in_bf16(folder):
    store, target = Store(folder), TARGET.model(dtype=torch.float32, device="cpu")
    assert len(store) == 6
    for index in range(6):
        sample = store.read(index)
        with torch.no_grad():
            out = target(sample.input_ids[None], output_hidden_states=True)
        states = torch.cat([out.hidden_states[k][0] for k in store.manifest.layer_ids], -1)
        assert (sample.aux.float() - states).norm() < 4e-3 * states.norm()
        assert 0 < sample.loss_mask.sum() <= 25


def test_the_targets_logits_are_rebuilt_from_the_store(folder):
    store, target = Store(folder), TARGET.model(dtype=torch.float32, device="cpu")
    manifest = store.manifest
    head = TargetHead.load(folder / "target.safetensors", eps=manifest.rms_norm_eps, softcap=None)
    sample = store.read(0)
    with torch.no_grad():
        logits = target(sample.input_ids[None]).logits[0]
    p, q = torch.softmax(logits, -1), torch.softmax(head(sample.final), -1)
    assert (p - q).abs().sum(-1).max() < 0.05  # the store is bf16
    assert head.head.dtype == torch.bfloat16  # nothing is lost: the weights were bf16


def test_greedy_answers_are_the_targets_greedy_output(folder):
    answers = read_answers(folder / "answers.jsonl")
    assert {a.greedy for a in answers} == {True, False}
    assert all(a.messages[-1]["role"] == "assistant" for a in answers)


def test_an_interrupted_capture_goes_on_and_ends_with_the_same_store(folder, tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(extract_module, "extract_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            capture(TARGET, CONFIG, tmp_path)
    with open(tmp_path / "answers.jsonl", "a") as file:
        file.write('{"id": "torn')
    with pytest.raises(ValueError, match="no store"):
        Store(tmp_path)
    capture(TARGET, CONFIG, tmp_path)
    first, second = Store(folder), Store(tmp_path)
    assert {e.sample for e in first.entries} == {e.sample for e in second.entries}
    assert not (tmp_path / "partial").exists()
    hashes = [{e.sample: e.hashes for e in store.entries} for store in (first, second)]
    assert hashes[0] == hashes[1]


OTHER_SETTINGS = {
    "max_new_tokens": 25,
    "val_share": 0.31,
    "dtype": "bfloat16",
    "start_layers": [0],
    "seed": 1,
    "regenerate": False,
    "reasoning": "mask",
    "template_options": {"enable_thinking": False},
}


@pytest.mark.parametrize("setting", OTHER_SETTINGS)
def test_a_store_made_with_other_settings_is_refused_by_name(folder, setting):
    value = OTHER_SETTINGS[setting]
    words = f"made with {setting} = .*, and this run asks for {re.escape(repr(value))}: capture"
    with pytest.raises(ValueError, match=words):
        capture(TARGET, replace(CONFIG, **{setting: value}), folder)


def test_a_store_of_other_layers_is_refused_by_field(folder):
    with pytest.raises(ValueError, match="captured with layer_ids"):
        capture(TARGET, replace(CONFIG, layer_ids=[2, 5]), folder)


def own_prompts(path, *texts):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return replace(CONFIG, prompts=[PromptSource(str(path))], max_new_tokens=4)


def test_an_edited_prompt_file_is_another_one_and_a_moved_one_is_not(tmp_path):
    texts, store = ["def a():", "def b():"], tmp_path / "store"
    capture(TARGET, own_prompts(tmp_path / "mine.jsonl", *texts), store)
    kept = (store / "answers.jsonl").read_bytes()
    capture(TARGET, own_prompts(tmp_path / "elsewhere" / "mine.jsonl", *texts), store)
    edited = own_prompts(tmp_path / "mine.jsonl", "def c():", "def b():")
    with pytest.raises(ValueError, match="made from other prompts: what is in 'mine' has changed"):
        capture(TARGET, edited, store)
    other = own_prompts(tmp_path / "other.jsonl", *texts)
    with pytest.raises(ValueError, match="prompt sets mine, and this run asks for other: capture"):
        capture(TARGET, other, store)
    assert (store / "answers.jsonl").read_bytes() == kept


def test_prompts_edited_while_their_capture_was_interrupted_are_refused(tmp_path, monkeypatch):
    def killed(*args):
        raise KeyboardInterrupt

    config = own_prompts(tmp_path / "mine.jsonl", "def a():", "def b():")
    with monkeypatch.context() as patch:
        patch.setattr(extract_module, "extract_batch", killed)
        with pytest.raises(KeyboardInterrupt):
            capture(TARGET, config, tmp_path / "store")
    edited = own_prompts(tmp_path / "mine.jsonl", "def b():", "def a():")
    with pytest.raises(ValueError, match="'mine' has changed: capture into another --store"):
        capture(TARGET, edited, tmp_path / "store")


def test_answers_to_rows_that_changed_on_the_hub_are_refused(tmp_path):
    said = Answer("set/0", [{"role": "user", "content": "Hi"}], True, True, [])
    same, other = Prompt("set/0", None, ("Hi", "And?")), Prompt("set/0", None, ("Bye",))
    refuse_other_prompts([said], [same], tmp_path)
    with pytest.raises(ValueError, match="set/0 has changed since"):
        refuse_other_prompts([said], [other], tmp_path)


def copied_target(copy):
    copy.mkdir()
    for path in Path(TARGET.path).glob("*.*"):
        if path.suffix in (".json", ".safetensors", ".jinja"):
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_a_store_whose_answers_end_elsewhere_is_refused(folder, tmp_path):
    copy = copied_target(tmp_path / "copy")
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [1, 9]}))
    with pytest.raises(ValueError, match=r"made with end_tokens = \[.*asks for \[1, .*9\]"):
        capture(TargetSource(str(copy)), CONFIG, folder)


def test_a_moved_target_is_still_the_same_target(folder, tmp_path):
    copy = copied_target(tmp_path / "elsewhere")
    capture(TargetSource(str(copy)), CONFIG, folder)  # finds the store complete
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    with pytest.raises(ValueError, match="fingerprint"):
        capture(TargetSource(str(copy)), CONFIG, folder)


def test_layer_ids_outside_the_target_are_refused():
    with pytest.raises(ValueError, match="must be ascending, unique and in 0"):
        wanted_manifest(TARGET, replace(CONFIG, layer_ids=[2, 9]))


def test_an_unknown_target_is_one_sentence():
    with pytest.raises(ValueError, match=r"target '\./no-such-folder' cannot be opened"):
        TargetSource("./no-such-folder").config()


def test_prompts_that_leave_no_room_are_refused(tmp_path):
    with pytest.raises(ValueError, match="max_tokens = 10 is smaller than every prompt"):
        capture(TARGET, replace(CONFIG, max_tokens=10), tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_effective_norms_are_read_from_any_convention():
    target = make_target()
    head = target_head_of(target, target.config)
    states = torch.randn(3, 32, dtype=torch.float64)
    wanted = target.lm_head(target.model.norm(states))
    assert torch.allclose(head(states).double(), wanted, atol=1e-4)


@pytest.mark.parametrize(
    "own",
    [
        {"repetition_penalty": 5.0, "no_repeat_ngram_size": 1},
        {"min_p": 0.999, "typical_p": 0.1},
        {"num_beams": 4},
        {"suppress_tokens": list(range(20, 400))},
    ],
)
def test_the_targets_own_settings_do_not_bend_its_answers(own):
    model, tokenizer = TARGET.model(dtype=torch.float32, device="cpu"), TARGET.tokenizer()
    talk = [{"role": "user", "content": "def close(self):"}]
    prompts = [prompt_ids(tokenizer, talk)]

    def answers() -> list:
        torch.manual_seed(0)
        return [generate(model, tokenizer, prompts, greedy, CONFIG) for greedy in (True, False)]

    plain = answers()
    model.generation_config.update(**own)
    assert answers() == plain
    assert all(getattr(model.generation_config, key) == value for key, value in own.items())


@pytest.mark.parametrize("content", ['{"question": 1}\n', "my notes", '{"id": 1}\n'])
def test_answers_that_no_capture_wrote_are_refused_and_stay(tmp_path, content):
    path = tmp_path / "answers.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="was not written by a capture"):
        generate_missing(lambda *_: iter(()), [], path)
    assert path.read_text() == content


def test_only_what_a_writer_left_counts_as_unfinished(tmp_path):
    ours = {"shard-00001.safetensors.tmp", "shard-00001.parquet.tmp"}
    for name in (*ours, "thesis.tmp", "shard-plan.tmp", "shard-00001.tmp"):
        (tmp_path / name).touch()
    assert {path.name for path in unfinished_files(tmp_path)} == ours
