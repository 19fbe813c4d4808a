import json

import pytest

from peagle.data.prompts import PromptSource, load_prompts


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


def test_a_system_message_opens_the_conversation(tmp_path):
    row = {"messages": [{"role": "system", "content": "Be brief."},
                        {"role": "user", "content": "Hi"}]}  # fmt: skip
    prompt = load_prompts(PromptSource(write(tmp_path, row)))[0]
    assert [m["role"] for m in prompt.opening()] == ["system", "user"]


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
