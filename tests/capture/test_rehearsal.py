"""What is wrong with prompts is found by the tokenizer alone, before anything is written."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
from chat_templates import QWEN3, TEMPLATES, tokenizer_with

from peagle.capture import capture as capture_module
from peagle.capture.capture import capture, require_both_splits, within_positions
from peagle.capture.chat import prompt_ids, turns_from_messages
from peagle.capture.config import CaptureConfig
from peagle.capture.identity import PARTIAL, refuse_other_settings, wanted_manifest
from peagle.capture.prompts import Prompt, PromptSource
from peagle.capture.rehearsal import rehearse
from peagle.decode.evaluation import EvaluationConfig, prompt_batches
from peagle.store.index import split_of
from peagle.target.target import TargetSource
from peagle.train.packed_sequences import refuse_mask_tokens

TARGET = TargetSource("tiny")
TOOL = {"type": "function", "function": {"name": "look_up"}}
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": 'the "sky"'}}}


def rehearsed(*prompts, template=None, **settings):
    tokenizer = TARGET.tokenizer() if template is None else tokenizer_with(template)
    return rehearse(prompts, tokenizer, TARGET.config(), None, **settings).prompts


@pytest.mark.parametrize(
    ("prompt", "template", "words"),
    [
        (Prompt("p", "Be brief.", ("Hi",)),
         "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
         "{{ messages[-1].content }}", "refuses it .no system"),
        (Prompt("p", "Be brief.", ("Hi",)), "{{ messages[-1].content }}", "the system's words"),
        (Prompt("p", None, ("Hi", "And?")), "{{ messages[-1].content }}", "the user's words"),
        (Prompt("p", None, ("Hi",), (TOOL,)), None, "does not offer the row's tools"),
        (Prompt("p", None, ("Hi", "a <|draft_mask|>")), None, "holds the mask token .*id 3"),
    ],
)  # fmt: skip
def test_a_prompt_that_cannot_be_asked_is_named_by_its_place(prompt, template, words):
    fine = Prompt("q", None, ("fine",))
    assert rehearsed(fine, template=template, mask_token_id=3) == [fine]
    with pytest.raises(ValueError, match=f"set.jsonl, line 7.*{words}"):
        rehearsed(fine, prompt._replace(place="set.jsonl, line 7"), template=template,
                  mask_token_id=3)  # fmt: skip


def test_an_option_that_the_template_would_ignore_is_refused():
    prompt, tokenizer, text = Prompt("p", None, ("Hi",)), tokenizer_with(QWEN3), TARGET.config()
    text.vocab_size = len(tokenizer)
    assert rehearse([prompt], tokenizer, text, {"enable_thinking": False}).prompts == [prompt]
    with pytest.raises(ValueError, match="does not know 'enable_thinkin': correct"):
        rehearse([prompt], tokenizer, text, {"enable_thinkin": False})


def test_an_id_beyond_the_vocabulary_is_refused():
    text = TARGET.config()
    text.vocab_size = 20
    with pytest.raises(ValueError, match=r"a prompt has the token id \d+, beyond .* of 20"):
        rehearse([Prompt("p", None, ("Hi",))], TARGET.tokenizer(), text, None)


def test_prompts_longer_than_the_targets_positions_are_left_out_and_counted(capsys):
    positions = TARGET.config().max_position_embeddings
    short, long = Prompt("p", None, ("Hi",)), Prompt("q", None, ("x = 1\n" * positions,))
    assert rehearsed(short, long) == [short]
    assert f"1 of 2 prompts are longer than the target's {positions}" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"1 of 1 prompts are longer .*: give shorter ones"):
        rehearsed(long)
    config = CaptureConfig([PromptSource("stdlib")], max_tokens=positions + 1)
    assert within_positions(TARGET, config).max_tokens == positions


@pytest.mark.parametrize(
    ("answer", "template", "lost"),
    [
        ({"content": "", "tool_calls": [CALL]}, None, "tool calls"),
        ({"content": "4", "reasoning_content": "Two twos."}, TEMPLATES["llama3"], "reasoning"),
        ({"content": "<think>Two twos.</think>4"},
         "{% for m in messages %}[{{ m.content.split('</think>')[-1] }}]{% endfor %}", "words"),
    ],
)  # fmt: skip
def test_a_template_that_drops_calls_or_reasoning_of_an_answer_is_refused(answer, template, lost):
    talk = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", **answer}]
    with pytest.raises(ValueError, match=f"drops or rewrites turns .the assistant's {lost}"):
        rehearsed(Prompt("p", None, ("2 + 2?",), (), tuple(talk)), template=template,
                  answers_in_data=True)  # fmt: skip
    assert turns_from_messages(tokenizer_with(QWEN3), talk, ends=set())


def own_prompts(path, *texts):
    path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return CaptureConfig([PromptSource(str(path))])


def test_a_failed_start_leaves_nothing_and_an_empty_one_binds_nobody(tmp_path, monkeypatch):
    store = tmp_path / "store"
    config = own_prompts(tmp_path / "mine.jsonl", "def a():", "a <|draft_mask|>")
    with pytest.raises(ValueError, match="line 2 holds the mask token"):
        capture(TARGET, config, store, mask_token_id=3)
    assert not store.exists()

    def fail(*args):
        raise ValueError("no weights")

    monkeypatch.setattr(capture_module, "capture_share", fail)
    with pytest.raises(ValueError, match="no weights"):
        capture(TARGET, config, store)
    mended = own_prompts(tmp_path / "mine.jsonl", "def a():", "def b():")
    with pytest.raises(ValueError, match="no weights"):
        capture(TARGET, mended, store)
    (store / "answers.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="made with max_new_tokens = 512"):
        capture(TARGET, replace(mended, max_new_tokens=5), store)
    assert (store / PARTIAL / "manifest.json").exists() and wanted_manifest(TARGET, mended)


def test_a_store_that_may_outgrow_its_disk_is_warned_of_before_anything_is_asked(
    tmp_path, monkeypatch, capsys
):
    texts = "def a():", "def b():" * 50
    first, second = (len(prompt_ids(TARGET.tokenizer(), [{"role": "user", "content": text}]))
                     for text in texts)  # fmt: skip
    config = own_prompts(tmp_path / "mine.jsonl", *texts)
    config = replace(config, max_new_tokens=100, max_tokens=second + 50)  # which cuts the second
    most = (first + 100 + second + 50) * (3 * 192 * 2 + 9)  # layers 2 and 3, final
    monkeypatch.setattr(capture_module, "capture_share", lambda *_: None)
    for free, warned in ((most, False), (most - 1, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        capture(TARGET, config, tmp_path / "store")
        assert ("the store may need 0.00 GB at" in capsys.readouterr().err) == warned


def test_a_record_of_a_store_that_is_damaged_is_named(tmp_path):
    (tmp_path / "capture.json").write_text("{")
    with pytest.raises(ValueError, match=r"capture\.json is damaged .*: capture again"):
        refuse_other_settings(tmp_path, {"seed": 0})


def test_prompts_that_leave_a_split_empty_are_refused_with_the_right_advice():
    prompts = [Prompt(str(i), None, (f"def f{i}():",)) for i in range(20)]
    config = CaptureConfig([PromptSource("stdlib")], val_share=0.5)
    require_both_splits(prompts, config)
    for share, words in ((0.9999, "train split: .* lower"), (0.0001, "val split: .* raise")):
        with pytest.raises(ValueError, match=f"none of the 20 .*{words} capture.val_share"):
            require_both_splits(prompts, replace(config, val_share=share))


def test_conversations_that_ask_the_same_are_in_one_split():
    same = Prompt("a", None, ("Hi",)), Prompt("b", None, ("Hi",), (TOOL,), ({"role": "user"},))
    assert len({split_of(prompt.asked_id(), 0.5) for prompt in same}) == 1
    assert len({Prompt("a", system, ("Hi",)).asked_id() for system in (None, "Be brief.")}) == 2


def test_the_prompts_of_test_are_rendered_when_they_are_read(tmp_path):
    path = tmp_path / "held_out.jsonl"
    path.write_text('{"prompt": "Hi"}\n{"prompt": "And?", "tools": [{"name": "look_up"}]}\n')
    with pytest.raises(ValueError, match=r"held_out\.jsonl, line 2: the chat template does not"):
        prompt_batches(EvaluationConfig([PromptSource(str(path))]), TARGET)


def test_a_finished_store_that_holds_the_mask_token_is_refused_without_reading_states(random_store):
    from peagle.store.reader import Store

    store = Store(random_store)
    held = int(store.read(5).input_ids[3])
    store.read = None
    refuse_mask_tokens(store, None)
    refuse_mask_tokens(store, store.manifest.vocab_size)
    with pytest.raises(ValueError, match=f"contains the mask token {held}: choose"):
        refuse_mask_tokens(store, held)


@pytest.mark.parametrize(
    ("config", "section"), [(CaptureConfig, "capture"), (EvaluationConfig, "evaluation")]
)
@pytest.mark.parametrize("name", ["max_new_tokens", "batch_size"])
def test_a_size_of_zero_is_refused(config, section, name):
    with pytest.raises(ValueError, match=rf"{section}\.{name} must be at least 1, got 0"):
        config([PromptSource("stdlib")], **{name: 0})


def test_sampling_needs_a_temperature():
    with pytest.raises(ValueError, match=r"temperature must be above 0, got 0.0: .*greedy_share"):
        CaptureConfig([PromptSource("stdlib")], temperature=0.0)
    CaptureConfig([PromptSource("stdlib")], temperature=0.0, greedy_share=1.0)
