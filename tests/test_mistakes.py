"""Exceptions of libraries that a user can mend are one sentence; our own faults are tracebacks."""

from argparse import ArgumentError

import pytest
from huggingface_hub.errors import StrictDataclassFieldValidationError
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from safetensors import SafetensorError

from peagle.mistakes import is_mistake, sentence


@pytest.mark.parametrize(
    "error",
    [
        ValueError("x"),
        FileNotFoundError("x"),
        ArgumentError(None, "x"),
        MisconfigurationException("x"),
        SafetensorError("x"),
        StrictDataclassFieldValidationError("width", ValueError("x")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_a_user_can_mend_is_told_on_one_line(error):
    assert is_mistake(error)
    assert sentence(error) and "\n" not in sentence(error)


@pytest.mark.parametrize("kind", [TypeError, AssertionError, KeyError, AttributeError, IndexError])
def test_a_fault_of_ours_keeps_its_traceback(kind):
    assert not is_mistake(kind("x"))


def test_of_all_that_was_tried_only_the_fault_is_told():
    told = (
        'Parser key "trainer.callbacks":\n\n  - Expected a path but nope.X either not accessible\n'
        "  - Does not validate against any of the Union subtypes\n  Subtypes: [list]\n  Errors:\n"
        "    - Problem with given class_path 'nope.X':\n        No module named 'nope'\n"
        "    - Problem with given class_path 'nope.X':\n        No module named 'nope'\n"
    )
    assert sentence(ArgumentError(None, told)) == (
        "trainer.callbacks: Problem with given class_path 'nope.X': No module named 'nope' "
        "(--help lists the settings)"
    )


@pytest.mark.parametrize(
    "told",
    [
        "Problem with given class_path 'mine.jsonl':\n No module named 'mine'",
        "Expected a dot import path string: mine.jsonl",
        "Expected a <class 'list'>. Got value: mine.jsonl",
    ],
)
def test_how_a_prompt_set_is_written_is_said(told):
    error = ArgumentError(None, f'Parser key "capture.prompts":\n  - {told}\n')
    assert sentence(error) == ("capture.prompts must hold settings: write [{source: mine.jsonl}]")


def test_of_a_class_that_cannot_be_made_only_the_reason_is_told():
    told = (
        "Does not validate against any of the Union subtypes\nSubtypes: [Logger, bool]\nErrors:\n"
        "  - Not a valid subclass of Logger. Got value: [Namespace()]\n"
        "    Subclass types expect one of:\n    - a class path (str)\n"
        "  - Problem with given class_path 'a.WandbLogger':\n"
        "      Requirement 'wandb' not met. HINT: Try running `pip install -U wandb`\n"
        "  - Expected a <class 'bool'>\nGiven value type: <class 'list'>\nGiven value: [1]\n"
    )
    assert sentence(ValueError(told)) == (
        "Problem with given class_path 'a.WandbLogger': Requirement 'wandb' not met. HINT: Try "
        "running `pip install -U wandb` (--help lists the settings)"
    )
