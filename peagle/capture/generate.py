"""The target answers the prompts: greedily or sampled, resumable after a kill.

Who answers is transformers, batch by batch (here), or vLLM (``peagle/capture/generate_vllm.py``).
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Generator, Iterable
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peagle.capture.chat import Turn, fitting, turns_of
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Answer, answer_batch, first_prompt
from peagle.capture.prompts import Prompt


class Unit(NamedTuple):
    """Prompts that are answered together: their answers depend on each other's lengths, and draws.

    Which prompts make a unit follows from the prompts alone, so that a resumed capture, or one by
    several processes, answers as an uninterrupted one does.
    """

    greedy: bool
    prompts: list[Prompt]


Answers = Generator[list[Answer], None, None]
# Answers the prompts of units as far as they are not among the ids that are known.
Ask = Callable[[list[Unit], Collection[str]], Answers]


def different(prompts: list[Prompt], config: CaptureConfig) -> list[Prompt]:
    """Leave out prompts that would only repeat the conversation of another one."""
    found: dict[str, Prompt] = {}
    for prompt in prompts:
        repeats = not config.regenerate or is_greedy(prompt, config)
        content = prompt[1:4] if config.regenerate else prompt[1:]
        found.setdefault(json.dumps(content, default=str) if repeats else prompt.id, prompt)
    return list(found.values())


def units_of(prompts: list[Prompt], config: CaptureConfig) -> list[Unit]:
    """The greedy ones first."""
    groups = {
        greedy: [p for p in prompts if is_greedy(p, config) == greedy] for greedy in (True, False)
    }
    return [
        Unit(greedy, group[start : start + config.batch_size])
        for greedy, group in groups.items()
        for start in range(0, len(group), config.batch_size)
    ]


def regenerate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    units: list[Unit],
    config: CaptureConfig,
    path: Path,
) -> dict[str, Answer]:
    """The target's answers to all prompts by their ids; what is missing in ``path`` is asked."""
    known = add_answers(partial(by_model, model, tokenizer, config), units, path)
    found = {prompt.id: known[prompt.id] for unit in units for prompt in unit.prompts}
    answered = {name: answer for name, answer in found.items() if answer.turns}
    if len(answered) < len(found):
        print(f"{len(found) - len(answered)} of {len(found)} prompts are longer than max_tokens "
              "and were left out")  # fmt: skip
    say_cut(answered.values(), config)
    return answered


def add_answers(ask: Ask, units: list[Unit], path: Path) -> dict[str, Answer]:
    """Ask what is missing, and append the answers to ``path`` as they come; returns all of them.

    What other processes wrote into the same folder is not asked again.
    """
    prompts = [prompt for unit in units for prompt in unit.prompts]
    cut_torn_line(path)
    known = {a.id: a for other in path.parent.glob("answers*.jsonl") for a in read_answers(other)}
    refuse_other_prompts(known.values(), prompts, path.parent)
    missing = [unit for unit in units if any(prompt.id not in known for prompt in unit.prompts)]
    if not missing:
        return known
    mine = sum(prompt.id in known for prompt in prompts)
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=mine, desc="answers", disable=None) as bar,
        closing(ask(missing, frozenset(known))) as said,
    ):
        for answers in said:
            fresh = [answer for answer in answers if answer.id not in known]
            file.writelines(json.dumps(asdict(answer)) + "\n" for answer in fresh)
            file.flush()
            os.fsync(file.fileno())
            known |= {answer.id: answer for answer in fresh}
            bar.update(len(fresh))
    return known


def by_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: CaptureConfig,
    units: list[Unit],
    known: Collection[str],
) -> Answers:
    """Whole units, known answers included: which tokens are drawn depends on all of them."""
    for unit in units:
        yield answer_unit(model, tokenizer, unit, config)


def answer_unit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    unit: Unit,
    config: CaptureConfig,
) -> list[Answer]:
    """Answers to the prompts that leave room for one; the others get none."""
    room = config.max_tokens - 1
    fits = [p for p in unit.prompts if len(first_prompt(tokenizer, p, config)) < room]
    left = [Answer(p.id, p.opening(), True, unit.greedy, []) for p in unit.prompts if p not in fits]
    return left + (answer_batch(model, tokenizer, fits, unit.greedy, config) if fits else [])


def refuse_other_prompts(answers: Iterable[Answer], prompts: list[Prompt], folder: Path) -> None:
    """Raise ``ValueError`` when a row that was answered now asks something else.

    A data set on the Hub may change under its name.
    """
    asked = {prompt.id: prompt.opening() for prompt in prompts}
    for answer in answers:
        opening = asked.get(answer.id, answer.messages)
        if answer.messages[: len(opening)] != opening:
            raise ValueError(
                f"{folder} has answers to other prompts: {answer.id} has changed since; capture "
                "into another --store, or delete this one"
            )


def say_cut(answers: Collection[Answer], config: CaptureConfig) -> None:
    cut = sum(answer.cut for answer in answers)
    if cut:
        print(f"{cut} of {len(answers)} conversations do not fit max_tokens: cut at a turn")


def too_small(config: CaptureConfig) -> ValueError:
    return ValueError(f"max_tokens = {config.max_tokens} is smaller than every prompt: raise it")


def given(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], config: CaptureConfig, ends: set[int]
) -> dict[str, Answer]:
    """The conversations as the data hold them, answers included, by their prompts' ids.

    Raises:
        ValueError: if a row has no answers, or the template drops or rewrites what it says.
    """
    answers, too_long = {}, 0
    for prompt in prompts:
        if not prompt.messages:
            raise ValueError(
                f"prompt {prompt.id} has no answers in the data: set regenerate: true, or name "
                "the column with whole conversations"
            )
        last = max(i for i, m in enumerate(prompt.messages) if m["role"] == "assistant")
        messages = list(prompt.messages[: last + 1])
        options = prompt.options(config.template_options)
        turns = turns_of(tokenizer, messages, ends=ends, options=options)
        fit = fitting(turns, config.max_tokens)
        too_long += not fit
        if fit:
            cut = len(fit) < len(turns)
            answers[prompt.id] = Answer(prompt.id, messages, True, False, fit, cut)
    if too_long:
        print(f"{too_long} of {len(prompts)} first turns are longer than max_tokens: left out")
    say_cut(answers.values(), config)
    return answers


def cut_torn_line(path: Path) -> None:
    """Take off what a kill left of a line, so that the next one begins well."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def read_answers(path: Path) -> list[Answer]:
    """Finished lines; the last may be torn, or be written this moment by another process."""
    content = path.read_bytes()
    found = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
    return [
        Answer(**{**fields, "turns": [Turn(*turn) for turn in fields["turns"]]}) for fields in found
    ]


def is_greedy(prompt: Prompt, config: CaptureConfig) -> bool:
    return number_of(f"{config.seed} {prompt.id}") < config.greedy_share * 2**32


def number_of(text: str) -> int:
    """A number below 2**32 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])
