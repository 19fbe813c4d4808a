"""What ``test`` asks and counts, with the real embedded target and a random drafter."""

import json
from dataclasses import replace

import pytest
import torch
from random_parts import make_drafter

from peagle.callbacks.evaluate import format_acceptance
from peagle.capture.answers import end_of_turn, say_past_the_turn
from peagle.capture.chat import Turn
from peagle.capture.conversation import Answer
from peagle.capture.prompts import PromptSource
from peagle.decode.acceptance import acceptance_rows
from peagle.decode.decoder import Decoder
from peagle.decode.evaluation import EvaluationConfig, decode_batch, prompt_batches
from peagle.target.end_tokens import end_tokens
from peagle.target.target import TargetSource

# Decodes much of what test_decoder.py runs under the checks of shapes.
pytestmark = pytest.mark.usefixtures("without_type_checks")
TARGET = TargetSource("tiny")
ASKED = [["def pop(self):", "def push(self, item):"], ["def add(a, b):"], ["def a():", "def b():"]]


@pytest.fixture(scope="module")
def decoder():
    target = TARGET.model(dtype=torch.float32, device="cpu")
    text = TARGET.config()
    drafter = make_drafter(vocab_size=text.vocab_size, target_hidden_size=text.hidden_size)
    return Decoder(target, drafter.float().eval(), eos_ids=end_tokens(target, TARGET.tokenizer()))


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps({"turns": turns}) + "\n" for turns in ASKED))
    return EvaluationConfig(
        prompts=[PromptSource(str(path))], k=(2, 4), max_new_tokens=12, batch_size=2
    )


def own_answers(turns):
    """What the target says by itself, with transformers' own loop and no code of ours."""
    model, tokenizer = TARGET.model(dtype=torch.float32, device="cpu"), TARGET.tokenizer()
    messages, said = [], []
    for turn in turns:
        messages.append({"role": "user", "content": turn})
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        new = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        said += new.tolist()
        text = tokenizer.decode(new, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
    return said


def runs_of(decoder, config):
    tokenizer = TARGET.tokenizer()
    return [
        run
        for batch in prompt_batches(config, TARGET)
        for run in decode_batch({"p-eagle": decoder}, batch, config, tokenizer)
    ]


def test_later_turns_are_asked_in_the_context_of_the_targets_own_answers(decoder, config):
    wanted = [own_answers(turns) for turns in ASKED]
    runs = runs_of(decoder, config)
    for k in (0, 2, 4):
        mine = [run for run in runs if run.k == k]
        assert [tokens for run in mine for tokens in run.decoded.tokens] == wanted
        assert sum(run.turns for run in mine) == 5
    assert len(wanted[0]) > 12  # two answers are one count


def test_a_conversation_counts_once_with_all_its_turns(decoder, config):
    rows = acceptance_rows(runs_of(decoder, config), engine="here", dtype="float32")
    assert [(row["k"], row["prompts"], row["turns"]) for row in rows] == [(2, 3, 5), (4, 3, 5)]
    assert all(row["lossless_prompts"] == 3 for row in rows)
    assert "talks (3, 5 turns)" in format_acceptance(rows)


def test_sampled_answers_continue_the_same_greedy_history(decoder, config):
    sampled = replace(config, temperatures=(1.0,), k=(2,))
    runs = runs_of(decoder, sampled)
    assert {(run.temperature, run.k) for run in runs} == {(1.0, 0), (1.0, 2)}
    asked = []
    decode = decoder.decode

    def listening(prompts, **settings):
        asked.append((settings["k"], settings["temperature"], prompts))
        return decode(prompts, **settings)

    decoder.decode = listening
    try:
        runs_of(decoder, sampled)
    finally:
        del decoder.decode
    # Of each batch: alone and with drafts, then the history greedily, then the second turn.
    assert [(k, t) for k, t, _ in asked] == [(0, 1.0), (2, 1.0), (0, 0), (0, 1.0), (2, 1.0)] * 2
    tokenizer = TARGET.tokenizer()
    said = tokenizer.decode(own_answers(ASKED[0][:1]), skip_special_tokens=True)
    assert len(said) > 5 and said in tokenizer.decode(asked[3][2][0])


def test_one_turn_is_counted_as_one(decoder, tmp_path):
    config = EvaluationConfig([PromptSource("stdlib", "test", limit=2)], k=(2,), max_new_tokens=4)
    [row] = acceptance_rows(runs_of(decoder, config), engine="here", dtype="float32")
    assert (row["prompts"], row["turns"]) == (2, 2)
    assert "stdlib-test (2) " in format_acceptance([row])


def test_answers_past_the_end_of_a_turn_are_counted(capsys):
    tokenizer = TARGET.tokenizer()
    end = end_of_turn(tokenizer)
    assert tokenizer.decode([end]) == "<|im_end|>"
    turns = {"past": [9, end, 9, 0], "within": [9, 9, end]}
    answers = [Answer(name, [], True, True, [Turn([5], ids)]) for name, ids in turns.items()]
    say_past_the_turn(answers, tokenizer)
    assert "1 of 2 answers go on past '<|im_end|>'" in capsys.readouterr().out
    say_past_the_turn(answers[1:], tokenizer)
    assert capsys.readouterr().out == ""
