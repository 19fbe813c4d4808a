"""Loss masks from real template renderings."""

import pytest
import torch

from peagle.data.chat import conversation_id, prompt_ids, render
from peagle.model.target import TargetSource

TALK = [
    {"role": "user", "content": "def f(x):"},
    {"role": "assistant", "content": "    return x"},
    {"role": "user", "content": "def g(y):"},
    {"role": "assistant", "content": "    return y"},
]
PLAIN = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer():
    return TargetSource("tiny").tokenizer()


def supervised_text(tokenizer, rendered):
    return tokenizer.decode(rendered.input_ids[rendered.loss_mask])


def test_only_the_assistants_tokens_are_supervised(tokenizer):
    rendered = render(tokenizer, TALK)
    wanted = "    return x<|im_end|>    return y<|im_end|>"
    assert supervised_text(tokenizer, rendered) == wanted


def test_prefix_rendering_marks_what_the_generation_mask_marks(tokenizer, monkeypatch):
    marked = render(tokenizer, TALK)
    monkeypatch.setattr(tokenizer, "chat_template", PLAIN)
    plain = render(tokenizer, TALK)
    assert torch.equal(plain.input_ids, marked.input_ids)
    assert torch.equal(plain.loss_mask, marked.loss_mask)


def test_an_answer_never_merges_with_its_prompt(tokenizer):
    """The tokenizer has a token for a newline with indentation; a target cannot write half."""
    rendered = render(tokenizer, TALK[:2])
    whole = tokenizer(tokenizer.decode(rendered.input_ids), add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(whole) == tokenizer.decode(rendered.input_ids)
    assert len(whole) == len(rendered.input_ids) - 1


def test_an_answer_that_was_cut_off_has_no_end_token(tokenizer):
    rendered = render(tokenizer, TALK[:2], finished=False)
    assert supervised_text(tokenizer, rendered) == "    return x"
    assert rendered.input_ids[-1] != tokenizer.eos_token_id


def test_the_prompt_ends_where_the_answer_begins(tokenizer):
    prompt = prompt_ids(tokenizer, TALK[:1])
    rendered = render(tokenizer, TALK[:2])
    assert rendered.input_ids[: len(prompt)].tolist() == prompt
    assert rendered.loss_mask.tolist().index(True) == len(prompt)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "rewrites|no supervised"),
        ("{{ messages[-1].content }}", "rewrites|nothing but"),
        ("{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}",
         "no supervised"),
    ],
)  # fmt: skip
def test_a_template_that_hides_the_assistant_is_an_error_naming_the_sample(
    tokenizer, monkeypatch, template, words
):
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(ValueError, match=words) as error:
        render(tokenizer, [TALK[0], {"role": "assistant", "content": ""}])
    assert conversation_id([TALK[0], {"role": "assistant", "content": ""}]) in str(error.value)


def test_a_tokenizer_without_template_is_refused(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    with pytest.raises(ValueError, match="no chat template"):
        render(tokenizer, TALK)
