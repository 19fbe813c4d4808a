"""Loss masks from real template renderings."""

import pytest
import torch
from chat_templates import HARMONY, QWEN3, TEMPLATES, tokenizer_with

from peagle.capture.answers import turns_within
from peagle.capture.chat import (
    Turn,
    documents,
    mask_reasoning,
    prompt_ids,
    turns_from_messages,
)
from peagle.target.target import TargetSource

TALK = [
    {"role": "user", "content": "def f(x):"},
    {"role": "assistant", "content": "    return x"},
    {"role": "user", "content": "def g(y):"},
    {"role": "assistant", "content": "    return y"},
]
SYSTEM = {"role": "system", "content": "Answer in Python."}
TOOL = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def tokenizer():
    return TargetSource("tiny").tokenizer()


def rendered(tokenizer, messages, **options):
    ends = {tokenizer.eos_token_id}
    return documents(turns_from_messages(tokenizer, messages, ends=ends, options=options))


def supervised(tokenizer, found):
    """What the assistant says in each document, special tokens and all."""
    return [tokenizer.decode(document.input_ids[document.loss_mask]) for document in found]


def test_only_the_assistants_tokens_are_supervised(tokenizer):
    said = "".join(supervised(tokenizer, rendered(tokenizer, TALK)))
    assert said == "    return x<|im_end|>    return y<|im_end|>"


def test_an_answer_never_merges_with_its_prompt(tokenizer):
    """The tokenizer has a token for a newline with indentation; a target cannot write half."""
    [document] = rendered(tokenizer, TALK[:2])
    whole = tokenizer(tokenizer.decode(document.input_ids), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(whole) == tokenizer.decode(document.input_ids)
    assert len(whole) == len(document.input_ids) - 1


def test_the_prompt_ends_where_the_answer_begins(tokenizer):
    prompt = prompt_ids(tokenizer, TALK[:1])
    [document] = rendered(tokenizer, TALK[:2])
    assert document.input_ids[: len(prompt)].tolist() == prompt
    assert document.loss_mask.tolist().index(True) == len(prompt)


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["", "system"])
def test_every_familys_answers_are_supervised_with_their_end_and_nothing_else(family, system):
    tokenizer = tokenizer_with(TEMPLATES[family])
    messages = [*system, {"role": "user", "content": "Name a colour."},
                {"role": "assistant", "content": "Blue."}]  # fmt: skip
    [document] = rendered(tokenizer, messages)
    opening = {"qwen3": "<think>\n\n</think>\n\n", "harmony": "<|channel|>final<|message|>"}
    assert supervised(tokenizer, [document]) == [opening.get(family, "") + "Blue.<|im_end|>"]
    whole = tokenizer.decode(document.input_ids)
    assert "Name a colour." in whole and all(m["content"] in whole for m in system)


@pytest.mark.parametrize("family", ["llama3", "gemma"])
def test_a_history_that_stays_makes_one_document_of_all_turns(family):
    tokenizer = tokenizer_with(TEMPLATES[family])
    talk = [{**m, "content": m["content"].strip()} for m in [SYSTEM, *TALK]]
    turns = turns_from_messages(tokenizer, talk, ends={tokenizer.eos_token_id})
    assert len(turns) == 2
    # The embedded tokenizer may merge across a turn's end; the families' cannot.
    said = "".join(supervised(tokenizer, documents(turns)))
    assert said == "return x<|im_end|>return y<|im_end|>"


def test_reasoning_that_leaves_the_history_makes_a_document_of_each_answer():
    tokenizer = tokenizer_with(QWEN3)
    talk = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nTwo twos.\n</think>\n\n4"},
        {"role": "user", "content": "And 5?"},
        {"role": "assistant", "content": "9", "reasoning_content": "Four and five."},
    ]
    first, second = rendered(tokenizer, talk)
    assert supervised(tokenizer, [first, second]) == [
        "<think>\nTwo twos.\n</think>\n\n4<|im_end|>",
        "<think>\nFour and five.\n</think>\n\n9<|im_end|>",
    ]
    assert "Two twos." not in tokenizer.decode(second.input_ids)
    assert "4<|im_end|>" in tokenizer.decode(second.input_ids[~second.loss_mask])


def test_harmony_channels_belong_to_the_answer_and_earlier_analysis_does_not_stay():
    tokenizer = tokenizer_with(HARMONY)
    talk = [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "4", "thinking": "Two twos."},
        {"role": "user", "content": "And 5?"},
        {"role": "assistant", "content": "9", "thinking": "Four and five."},
    ]
    first, second = rendered(tokenizer, talk, reasoning_effort="high")
    assert supervised(tokenizer, [first]) == [
        "<|channel|>analysis<|message|>Two twos.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|im_end|>"
    ]
    assert "Two twos." not in tokenizer.decode(second.input_ids)
    assert "Reasoning: high" in tokenizer.decode(first.input_ids)


@pytest.mark.parametrize(
    ("template", "answer", "left"),
    [
        (QWEN3, {"content": "4", "reasoning_content": "Two twos."}, "\n\n4<|im_end|>"),
        (HARMONY, {"content": "4", "thinking": "Two twos."},
         "<|start|>assistant<|channel|>final<|message|>4<|im_end|>"),
    ],
    ids=["qwen3", "harmony"],
)  # fmt: skip
def test_reasoning_can_be_left_out_of_the_loss(template, answer, left):
    tokenizer = tokenizer_with(template)
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", **answer}]
    [document] = rendered(tokenizer, talk)
    masked = mask_reasoning(document, tokenizer)
    assert supervised(tokenizer, [masked]) == [left]
    assert torch.equal(masked.input_ids, document.input_ids)


def test_thinking_can_be_switched_off_as_a_server_does():
    tokenizer = tokenizer_with(QWEN3)
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    [document] = rendered(tokenizer, talk, enable_thinking=False)
    assert supervised(tokenizer, [document]) == ["4<|im_end|>"]


def test_tools_their_calls_and_their_results_are_in_the_context():
    tokenizer = tokenizer_with(QWEN3)
    call = {"function": {"name": "look_up", "arguments": {"word": "sky"}}}
    talk = [
        {"role": "user", "content": "Colour of the sky?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "blue, mostly"},
        {"role": "assistant", "content": "Blue."},
    ]
    found = rendered(tokenizer, talk, tools=[TOOL])
    said = "".join(supervised(tokenizer, found))
    assert '<tool_call>{"name": "look_up"' in said and said.endswith("Blue.<|im_end|>")
    assert "blue, mostly" not in said
    context = tokenizer.decode(found[-1].input_ids[~found[-1].loss_mask])
    assert "blue, mostly" in context and '"parameters"' in context


def test_turns_that_do_not_fit_are_left_out_whole():
    turns = [Turn([1] * 4, [2] * 3), Turn([1] * 9, [2] * 4), Turn([1] * 15, [2])]
    assert turns_within(turns, 13) == turns[:2]
    assert turns_within(turns, 12) == turns[:1]
    assert turns_within(turns, 6) == []


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "no supervised"),
        ("{{ messages[-1].content }}", "drops or rewrites turns"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         "no supervised"),
    ],
)  # fmt: skip
def test_a_template_that_hides_the_assistant_is_an_error_naming_the_place(template, words):
    talk = [TALK[0], {"role": "assistant", "content": ""}]
    with pytest.raises(ValueError, match=f"x.jsonl, line 2.*{words}"):
        turns_from_messages(tokenizer_with(template), talk, ends=set(), place="x.jsonl, line 2")


@pytest.mark.parametrize(
    ("template", "talk", "words"),
    [
        ("{% for m in messages[-2:] %}[{{ m.content }}]{% endfor %}", TALK, "the user's words"),
        ("{% for m in messages if m.role != 'system' %}[{{ m.content }}]{% endfor %}",
         [SYSTEM, *TALK], "the system's words"),
        ("{% for m in messages %}[{{ m.content | upper }}]{% endfor %}", TALK, "the user's words"),
        ("{% for m in messages %}[{{ m.content[:8] }}]{% endfor %}", TALK, "the user's words"),
        ("{% for m in messages %}[{{ m.content if m.role == 'user' else 'no' }}]{% endfor %}",
         TALK, "the assistant's words"),
    ],
    ids=["forgets", "ignores the system", "shouts", "shortens", "answers itself"],
)  # fmt: skip
def test_a_template_that_drops_or_rewrites_turns_is_refused(template, talk, words):
    with pytest.raises(ValueError, match=f"drops or rewrites turns.*{words}"):
        rendered(tokenizer_with(template), talk)


def test_what_a_template_refuses_is_said_with_its_place():
    talk = [TALK[0], *TALK]
    with pytest.raises(ValueError, match=r"a prompt: the chat template refuses .*alternate"):
        rendered(tokenizer_with(TEMPLATES["gemma"]), talk)


def test_a_tokenizer_without_template_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match=r"no chat template: put the model's chat_template\.jinja"):
        rendered(tokenizer, TALK)
