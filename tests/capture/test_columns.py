"""What becomes of the columns of every usual schema: the table of docs/data.md."""

import json
import re

import pytest
from paths import ROOT

from peagle.capture.prompts import PromptSource, load_prompts

TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "sky"}}}
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

# A row of each schema, then the system message, turns and tools that are asked.
SCHEMAS = {
    "Alpaca": (
        {"instruction": "Translate.", "input": "Hi", "output": "Salut"},
        (None, ("Translate.\n\nHi",), ()),
    ),
    "ShareGPT": ({"conversations": SHAREGPT}, (None, ("Hi",), ())),
    "OpenAI with tools": (
        {"messages": [SAID[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}],
         "tools": [TOOL], "parallel_tool_calls": False},
        (None, ("Hi",), (TOOL,)),
    ),
    "OpenOrca": (
        {"id": "a", "system_prompt": "Be brief.", "question": "Hi", "response": "Hello"},
        ("Be brief.", ("Hi",), ()),
    ),
    "LLaMA-Factory": (
        {"conversations": SHAREGPT, "system": "Be brief.", "tools": json.dumps([TOOL["function"]])},
        ("Be brief.", ("Hi",), (TOOL,)),
    ),
    "UltraChat": ({"prompt": "Hi", "prompt_id": "a", "messages": SAID}, (None, ("Hi",), ())),
    "Magpie": (
        {"uuid": "a", "instruction": "Hi", "response": "Hello", "conversations": SHAREGPT,
         "difficulty": "easy"},
        (None, ("Hi",), ()),
    ),
    "OpenCodeInstruct": (
        {"id": "a", "input": "Hi", "output": "Hello", "unit_tests": "[]"}, (None, ("Hi",), ())
    ),
    "GSM8K": ({"question": "Hi", "answer": "Hello"}, (None, ("Hi",), ())),
    "HumanEval": (
        {"task_id": "a", "prompt": "Hi", "canonical_solution": "pass", "test": "assert",
         "entry_point": "f"},
        (None, ("Hi",), ()),
    ),
    "MT-Bench": (
        {"category": "math", "prompt": ["Hi", "And?"], "reference": ["a", "b"]},
        (None, ("Hi", "And?"), ()),
    ),
}  # fmt: skip


def read(tmp_path, *rows, **settings):
    path = tmp_path / "set.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return load_prompts(PromptSource(str(path), **settings))


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_schemas_row_is_asked_with_all_that_it_says(tmp_path, schema):
    row, wanted = SCHEMAS[schema]
    assert [prompt[1:4] for prompt in read(tmp_path, row)] == [wanted]


def test_the_documents_table_has_every_schema():
    text = (ROOT / "docs/data.md").read_text()
    table = re.search(r"\| schema .*?\n\n", text, re.DOTALL)[0]
    listed = [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]
    assert listed == [*SCHEMAS, "plain text"]


def test_lines_of_plain_text_are_prompts_and_a_column_of_text_must_be_named(tmp_path):
    (tmp_path / "set.txt").write_text("Hi\n\nAnd?\n")
    prompts = load_prompts(PromptSource(str(tmp_path / "set.txt")))
    assert [prompt.turns for prompt in prompts] == [("Hi",), ("And?",)]
    with pytest.raises(ValueError, match="line 1 has no column any of"):
        read(tmp_path, {"text": "Hi"})
    assert read(tmp_path, {"text": "Hi"}, column="text")[0].turns == ("Hi",)


def test_messages_in_a_text_are_read_in_any_column(tmp_path):
    assert read(tmp_path, {"dialog": json.dumps(SAID)}, column="dialog")[0].turns == ("Hi",)
    for text in ('[{"a": 1}] What is it?', '[{"a": 1}]', "[{"):
        assert read(tmp_path, {"prompt": text})[0].turns == (text,)


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": json.dumps(SAID)}, ("Hi",)),
        ({"messages": [{"role": "USER", "content": "Hi"}]}, ("Hi",)),
        ({"messages": [{"role": "user", "content": ["H", {"type": "text", "text": "i"}]}]},
         ("Hi",)),
        ({"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Hello"]}}, ("Hi",)),
        ({"messages": None, "prompt": "Hi"}, ("Hi",)),
        ({"instruction": "And?", "input": "", "history": [["Hi", "Hello"]]}, ("Hi", "And?")),
        ({"instruction": "Sum up.", "context": "Hi"}, ("Sum up.\n\nHi",)),
    ],
)  # fmt: skip
def test_messages_are_read_however_they_are_written(tmp_path, row, turns):
    assert read(tmp_path, row)[0].turns == turns


def test_a_last_answer_beside_its_history_is_not_lost_in_silence(tmp_path):
    row = {"instruction": "And?", "history": [["Hi", "Hello"]], "output": "Bye"}
    [prompt] = read(tmp_path, row)
    with pytest.raises(ValueError, match=r"line 1 has its last answer beside its history"):
        prompt.answered()


def test_calls_and_reasoning_stay_with_the_answers_of_the_data(tmp_path):
    calls = json.dumps([{**CALL["function"], "arguments": '{"word": "sky"}'}])
    openai = {"role": "assistant", "reasoning_content": "Look it up.", "tool_calls": calls}
    sharegpt = {"from": "function_call", "value": json.dumps(CALL["function"])}
    first, second = read(
        tmp_path, {"messages": [SAID[0], openai]}, {"conversations": [SHAREGPT[0], sharegpt]}
    )
    assert first.answered()[1] == {"role": "assistant", "content": "", "tool_calls": [CALL],
                                   "reasoning_content": "Look it up."}  # fmt: skip
    assert second.answered()[1] == {"role": "assistant", "content": "", "tool_calls": [CALL]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"question": "Which?", "choices": ["a", "b"]}, "'choices' beside its 'question'"),
        ({"prompt": "Which?", "input": "a"}, "'input' beside its 'prompt': .*column: prompt"),
        ({"messages": SAID, "images": ["a.png"]}, "'images': only text"),
        ({"messages": SAID, "system": 5}, "its 'system' must be a text, not 5"),
        ({"messages": [{"role": "system", "content": "a"}, *SAID], "system": "b"}, "keep one"),
        ({"messages": [SAID[0], {"role": "system", "content": "a"}]}, "not its first and only"),
        ({"messages": [{"role": "critic", "content": "a"}]}, "of the role 'critic'"),
        ({"messages": '[{"role": "user"'}, "its messages are not JSON"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": None}]}]},
         "a part of text without text"),
        ({"prompt": None}, "empty prompt"),
        ({"prompt": "Say \ud83d"}, "half of a surrogate pair"),
        ({"prompt": "Hi", "tools": [{}]}, "a tool has no name"),
        ({"messages": [SAID[0], {"role": "assistant", "tool_calls": [{}]}]}, "function's name"),
        ({"instruction": "And?", "history": ["Hi"]}, "pairs of texts"),
        ({"conversations": ["Hi", "Hello"]}, "texts alone: write messages with a role"),  # LIMA's
    ],
)  # fmt: skip
def test_what_cannot_be_asked_is_refused_with_its_line(tmp_path, row, words):
    with pytest.raises(ValueError, match=rf"set\.jsonl, line 2\b.*{words}"):
        read(tmp_path, {"prompt": "fine"}, row)
