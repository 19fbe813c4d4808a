import json
from dataclasses import replace

import pytest

from peagle.capture import columns
from peagle.capture.config import CaptureConfig
from peagle.capture.prompts import Prompt, PromptSource, load_prompts, prompt_set_hash
from peagle.decode.evaluation import EvaluationConfig


def write(tmp_path, *rows):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "def f():"}, ("def f():",)),
        ({"question": "How many?", "answer": "Two."}, ("How many?",)),
        ({"turns": ["First?", "Second?"], "category": "x"}, ("First?", "Second?")),
        (
            {"messages": [{"role": "user", "content": "Hi"},
                          {"role": "assistant", "content": "not ours"},
                          {"role": "user", "content": "Bye"}]},
            ("Hi", "Bye"),
        ),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "x"}]},
         ("Hi",)),
    ],
)  # fmt: skip
def test_only_the_users_turns_are_kept(tmp_path, row, turns):
    assert load_prompts(PromptSource(write(tmp_path, row)))[0].turns == turns


def test_another_column_is_one_line_of_the_table(tmp_path, monkeypatch):
    def read_lines(value, name):
        return [{"role": "user", "content": line} for line in value.splitlines()]

    path = write(tmp_path, {"queries": "First?\nSecond?"})
    with pytest.raises(ValueError, match=r"line 1 has no column any of messages, conversations"):
        load_prompts(PromptSource(path))
    monkeypatch.setitem(columns.COLUMNS, "queries", read_lines)
    assert load_prompts(PromptSource(path))[0].turns == ("First?", "Second?")


def test_a_system_message_opens_the_conversation(tmp_path):
    row = {"messages": [{"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "Hi"}]}  # fmt: skip
    prompt = load_prompts(PromptSource(write(tmp_path, row)))[0]
    assert [m["role"] for m in prompt.opening()] == ["system", "user"]


def test_an_empty_system_message_is_heard_and_keeps_out_the_templates_own(tmp_path):
    row = {"messages": [{"role": "system", "content": ""}, {"role": "user", "content": "Hi"}]}
    assert load_prompts(PromptSource(write(tmp_path, row)))[0].opening() == row["messages"]


def test_the_limit_keeps_the_first_rows(tmp_path):
    path = write(tmp_path, *({"prompt": str(i)} for i in range(5)))
    assert [p.turns[0] for p in load_prompts(PromptSource(path, limit=2))] == ["0", "1"]


def test_the_built_in_splits_share_no_prompt():
    train = {p.turns for p in load_prompts(PromptSource("stdlib"))}
    test = {p.turns for p in load_prompts(PromptSource("stdlib", "test"))}
    assert len(train) > 900 and len(test) > 100
    assert not train & test


@pytest.mark.parametrize(
    ("rows", "column", "words"),
    [
        ((), None, "is empty"),
        (({"text": "x"},), None, "has no column"),
        (({"prompt": "x"},), "task", "has no column task"),
        (({"prompt": ""},), None, "empty prompt"),
    ],
)
def test_a_set_without_prompts_is_refused(tmp_path, rows, column, words):
    with pytest.raises(ValueError, match=words):
        load_prompts(PromptSource(write(tmp_path, *rows), column=column))


def test_a_missing_file_is_named():
    with pytest.raises(ValueError, match=r"nowhere\.jsonl does not exist"):
        load_prompts(PromptSource("nowhere.jsonl"))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[1, 2]", r'line 2 must be an object as \{"prompt": "..."\} is, not \[1, 2\]'),
        (b"7", "line 2 must be an object .* not 7"),
        (b'"' + b"x" * 99 + b'"', r"not \"x{36}\.\.\.$"),
        (b'{"prompt": "torn', "line 2 is not JSON .Unterminated string"),
        (b'{"prompt": "\xff"}', "line 2 is not UTF-8 text"),
        (b'{"prompt": 5}', "line 2 must hold a text, texts, or messages, not 5"),
        (b'{"prompt": ["a", 5]}', r'must hold a text, texts, or messages, not \["a", 5\]'),
        (b'{"messages": [{"role": "user", "content": 5}]}', "content is 5, not text"),
        (b'{"prompt": "a", "tools": {"b": 1}}', r'tools must be a list of objects, not \{"b": 1'),
        (b'{"prompt": "FULL BENCHMARK DATA SHOULD BE FETCHED FROM"}', "line 2 is a placeholder"),
    ],
)  # fmt: skip
def test_a_row_that_is_none_is_one_sentence_with_its_place(tmp_path, line, words):
    path = tmp_path / "set.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=words) as error:
        load_prompts(PromptSource(str(path)))
    assert "set.jsonl" in str(error.value)
    assert len(load_prompts(PromptSource(str(path), limit=1))) == 1


def test_only_a_line_feed_ends_a_line_and_empty_lines_are_no_rows(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('\ufeff{"prompt": "a\u2028b"}\r\n\n{"prompt": "c"}', encoding="utf-8")
    assert [p.turns[0] for p in load_prompts(PromptSource(str(path), limit=2))] == ["a\u2028b", "c"]


@pytest.mark.parametrize("config", [CaptureConfig, EvaluationConfig])
def test_two_sets_of_one_name_are_refused_until_one_has_a_label(config):
    same = [PromptSource("one/train.jsonl"), PromptSource("two/train.jsonl")]
    with pytest.raises(ValueError, match=r"two prompt sets are called 'train': .*label"):
        config(prompts=same)
    config(prompts=[same[0], replace(same[1], label="two")])


def test_a_label_names_a_sets_prompts(tmp_path):
    source = PromptSource(write(tmp_path, {"prompt": "a"}), label="mine")
    assert load_prompts(source)[0].id == "mine/0"


def test_a_short_name_stands_for_a_set_on_the_hub_and_can_be_overruled():
    assert PromptSource("gsm8k", "test").address() == (
        "openai/gsm8k", "test", "question", "main"
    )  # fmt: skip
    assert PromptSource("mt_bench").address().repository == "HuggingFaceH4/mt_bench_prompts"
    assert PromptSource("org/set").address() == ("org/set", "train", None, None)
    assert PromptSource("org/set", subset="b", column="c").address()[2:] == ("c", "b")


def test_a_set_on_the_hub_is_known_by_its_address_alone():
    """No network is needed, and none is there in tests."""
    found = {prompt_set_hash(PromptSource("org/set", **{key: value})) for key, value in [
        ("split", "test"), ("subset", "main"), ("column", "text"), ("limit", 5), ("revision", "v1"),
        ("split", "train"),
    ]}  # fmt: skip
    assert len(found) == 6
    assert prompt_set_hash(PromptSource("org/set")) == prompt_set_hash(
        PromptSource("org/set", "train")
    )


def test_a_local_set_is_known_by_what_it_says(tmp_path):
    path = write(tmp_path, {"prompt": "a", "note": "x"}, {"prompt": "b"})
    first = prompt_set_hash(PromptSource(path))
    write(tmp_path, {"prompt": "a", "note": "y"}, {"prompt": "b"})
    assert prompt_set_hash(PromptSource(path)) == first
    assert prompt_set_hash(PromptSource(path, limit=1)) != first
    write(tmp_path, {"prompt": "b"}, {"prompt": "a"})
    assert prompt_set_hash(PromptSource(path)) != first


def test_a_limit_below_one_is_refused():
    with pytest.raises(ValueError, match="limit must be at least 1, got 0"):
        PromptSource("stdlib", limit=0)


@pytest.mark.parametrize("setting", [{"split": "test"}, {"subset": "main"}, {"revision": "v1"}])
def test_what_a_file_does_not_have_is_refused_and_not_ignored(tmp_path, setting):
    path = tmp_path / "set.jsonl"
    path.write_text('{"prompt": "x"}\n')
    (name,) = setting
    with pytest.raises(ValueError, match=f"has no {name}: leave out {name}"):
        load_prompts(PromptSource(str(path), **setting))


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}])
def test_an_answer_that_its_data_do_not_train_is_refused(mark):
    said = ({"role": "user", "content": "Hi"}, {"role": "assistant", "content": "bad", **mark})
    prompt = Prompt("p", None, ("Hi",), messages=said, place="mine.jsonl, line 3")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 3 has an answer that is not to be"):
        prompt.answered()
