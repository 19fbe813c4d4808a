"""Chat data of several turns through capture, with the real embedded target."""

import json

import pytest
from chat_templates import HARMONY, QWEN3, tokenizer_with

from peagle.capture.capture import capture
from peagle.capture.chat import answer_text
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Conversation
from peagle.capture.prompts import Prompt, PromptSource, load_prompts
from peagle.store.reader import Store
from peagle.target.target import TargetSource

TARGET = TargetSource("tiny")
ASKED = ["def first(x):", "def second(x):", "def third(x):"]


def data(tmp_path, *rows):
    path = tmp_path / "talks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def openai(*texts, **rest):
    roles = ["user", "assistant"] * len(texts)
    return {
        "messages": [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)],
        **rest,
    }


def captured(tmp_path, path, **changes):
    config = CaptureConfig(
        prompts=[PromptSource(path)],
        **{"max_new_tokens": 12, "dtype": "float32", "val_share": 0.5, **changes},
    )
    capture(TARGET, config, tmp_path / "store")
    store, tokenizer = Store(tmp_path / "store"), TARGET.tokenizer()
    samples = [store.read(i) for i in range(len(store))]
    return [
        (tokenizer.decode(s.input_ids), tokenizer.decode(s.input_ids[s.loss_mask])) for s in samples
    ]


def test_answers_of_the_data_are_taken_when_asked_for(tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "def g(y):"},
                                  {"from": "gpt", "value": "    return 7"}]}  # fmt: skip
    path = data(tmp_path, openai("def f(x):", "    return x"), sharegpt)
    found = captured(tmp_path, path, regenerate=False)
    assert sorted(said for _, said in found) == [
        "    return 7<|im_end|>",
        "    return x<|im_end|>",
    ]


def test_the_target_answers_every_turn_itself(tmp_path):
    row = openai(ASKED[0], "somebody else's words", ASKED[1], "theirs", ASKED[2])
    found = captured(tmp_path, data(tmp_path, row))
    assert all("somebody else" not in text for text, _ in found)
    answers = json.loads((tmp_path / "store" / "answers.jsonl").read_text())
    asked = [m["content"] for m in answers["messages"] if m["role"] == "user"]
    assert asked == ASKED[: len(asked)] and len(answers["turns"]) == len(asked)
    prompt, answer = answers["turns"][0]
    assert any(answer == s.input_ids[len(prompt) : len(prompt) + len(answer)].tolist()
               for s in map(Store(tmp_path / "store").read, range(len(found))))  # fmt: skip


def test_a_conversation_that_does_not_fit_is_cut_at_a_turn_and_counted(tmp_path, capsys):
    long_row = openai(ASKED[0], "    return 1", "x = 1\n" * 200, "    return 2")
    path = data(tmp_path, long_row, openai(ASKED[1], "    return 3"))
    found = captured(tmp_path, path, regenerate=False, max_tokens=120)
    assert "1 of 2 conversations do not fit max_tokens: cut at a turn" in capsys.readouterr().out
    assert sorted(said for _, said in found) == ["    return 1<|im_end|>", "    return 3<|im_end|>"]


def conversation(turns, max_tokens):
    config = CaptureConfig(prompts=[PromptSource("stdlib")], max_tokens=max_tokens)
    return Conversation(TARGET.tokenizer(), Prompt("p", None, turns), config)


def test_a_conversation_ends_before_the_prompt_that_leaves_no_room():
    cut = conversation((ASKED[0], "x = 1\n" * 200), max_tokens=120)
    assert cut.next_prompt()
    cut.add_answer([40, 41, TARGET.tokenizer().eos_token_id], True)
    assert not cut.next_prompt()
    answer = cut.to_answer(greedy=True)
    assert answer.cut and answer.finished and len(answer.turns) == 1
    assert [m["role"] for m in answer.messages] == ["user", "assistant"]


def test_an_answer_that_leaves_the_room_cuts_its_turn_or_the_first_answer_itself():
    again = conversation((ASKED[0], ASKED[1]), max_tokens=100)
    assert again.next_prompt()
    again.add_answer([40, TARGET.tokenizer().eos_token_id], True)
    assert again.next_prompt()
    again.add_answer([40] * 100, True)
    assert again.to_answer(greedy=True).cut and len(again.turns) == 1 and len(again.messages) == 2
    first = conversation((ASKED[0],), max_tokens=40)
    assert first.next_prompt()
    first.add_answer([40] * 100, True)
    answer = first.to_answer(greedy=True)
    assert not answer.finished and sum(map(len, answer.turns[0])) == 40


def test_an_answer_for_which_an_engine_had_no_more_room_cuts_its_turn_as_a_longer_one_does():
    again = conversation((ASKED[0], ASKED[1]), max_tokens=100)
    assert again.next_prompt()
    again.add_answer([40, TARGET.tokenizer().eos_token_id], True)
    assert again.next_prompt()
    again.add_answer([40] * (100 - len(again.asked)), False)
    assert again.to_answer(greedy=True).cut and len(again.turns) == 1 and len(again.messages) == 2
    first = conversation((ASKED[0], ASKED[1]), max_tokens=40)
    assert first.next_prompt()
    first.add_answer([40] * (40 - len(first.asked)), False)
    answer = first.to_answer(greedy=True)
    assert not answer.finished and sum(map(len, answer.turns[0])) == 40 and not first.next_prompt()


def test_a_first_turn_that_does_not_fit_is_left_out_and_counted(tmp_path, capsys):
    rows = [openai("x = 1\n" * 200, "    return 1"), openai(ASKED[0], "    return 2")]
    path = data(tmp_path, *rows, openai(ASKED[1], "    return 3"))
    found = captured(tmp_path, path, regenerate=False, max_tokens=100)
    assert "1 of 3 first turns are longer than max_tokens" in capsys.readouterr().out
    assert len(found) == 2


def test_data_without_answers_cannot_be_taken_as_they_are(tmp_path):
    with pytest.raises(ValueError, match=r"talks\.jsonl, line 1 has no answers.*regenerate: true"):
        captured(tmp_path, data(tmp_path, {"prompt": "def f(x):"}), regenerate=False)


def test_nobody_goes_on_after_a_tool_answered_somebody_elses_call(tmp_path):
    tool = {"type": "function", "function": {"name": "look_up"}}
    talk = [
        {"role": "user", "content": "Colour of the sky?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "look_up"}}]},
        {"role": "tool", "content": "blue"},
        {"role": "user", "content": "And of grass?"},
    ]
    path = data(tmp_path, {"messages": talk, "tools": json.dumps([tool])})
    [prompt] = load_prompts(PromptSource(path))
    assert prompt.turns == ("Colour of the sky?",) and prompt.tools == (tool,)
    assert [m["role"] for m in prompt.messages] == ["user", "assistant", "tool", "user"]


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        (
            {"role": "user", "content": [{"type": "image_url"}]},
            "holds images, sound",
        ),
        ({"role": "user"}, "without role or content"),
        ({"content": "Hi"}, "without role or content"),
    ],
)
def test_a_message_that_is_none_is_refused_by_row(tmp_path, message, problem):
    with pytest.raises(ValueError, match=f"line 1 .*{problem}"):
        load_prompts(PromptSource(data(tmp_path, {"messages": [message]})))


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (QWEN3, "<think>\nTwo twos.\n</think>\n\nIt is 4<|im_end|>"),
        (HARMONY, "<|channel|>analysis<|message|>Two twos.<|end|><|start|>assistant"
                  "<|channel|>final<|message|>It is 4<|im_end|>"),
        (QWEN3, "It is 4<|im_end|>"),
    ],
    ids=["qwen3", "harmony", "none"],
)  # fmt: skip
def test_the_history_holds_what_was_said_without_the_reasoning(template, said):
    tokenizer = tokenizer_with(template)
    assert (
        answer_text(tokenizer, tokenizer(said, add_special_tokens=False)["input_ids"]) == "It is 4"
    )
