"""The conversations that become samples: generated once and kept, or taken from the data.

Generated answers are appended to ``answers.jsonl`` as they come, so that a killed capture goes on
where it was. Who generates them is transformers (``generate.py``) or vLLM (``one_pass.py``).
"""

import json
import os
from collections.abc import Callable, Collection, Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from transformers import PreTrainedTokenizerBase as Tokenizer

from peagle.capture.chat import REASONING, Turn, render, turns_from_messages
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Answer
from peagle.capture.prompts import Prompt
from peagle.capture.work_split import PromptBatch
from peagle.progress import progress

LINE_START = b'{"id": '  # of every answer in the file
Answers = Generator[list[Answer], None, None]
# Answers the prompts of batches as far as they are not among the ids that are known.
Generate = Callable[[list[PromptBatch], Collection[str]], Answers]


def generate_missing(
    generate: Generate, batches: list[PromptBatch], path: Path
) -> dict[str, Answer]:
    """Append the answers that are missing in ``path`` as they come; returns all, by prompt.

    What other processes wrote into the same folder is not asked again.

    Raises:
        ValueError: if a prompt that was answered has changed.
    """
    prompts = [prompt for batch in batches for prompt in batch.prompts]
    known = known_answers(prompts, path)
    missing = [batch for batch in batches if any(p.id not in known for p in batch.prompts)]
    if missing:
        done = sum(prompt.id in known for prompt in prompts)
        with (
            open(path, "a", encoding="utf-8") as file,
            progress("answers", len(prompts), done=done) as bar,
            closing(generate(missing, frozenset(known))) as generated,
        ):
            for answers in generated:
                fresh = [answer for answer in answers if answer.id not in known]
                append_answers(file, fresh)
                known |= {answer.id: answer for answer in fresh}
                bar.update(len(fresh))
    return {prompt.id: known[prompt.id] for prompt in prompts}


def known_answers(prompts: list[Prompt], path: Path) -> dict[str, Answer]:
    """Answers in ``path`` and in the files of other processes beside it, by prompt.

    Raises:
        ValueError: if a prompt that was answered has changed.
    """
    known = {a.id: a for other in path.parent.glob("answers*.jsonl") for a in read_answers(other)}
    refuse_other_prompts(known.values(), prompts, path.parent)
    cut_torn_line(path)
    return known


def append_answers(file: TextIO, answers: Iterable[Answer]) -> None:
    """Write answers as lines, on the disk by the return."""
    file.writelines(json.dumps(asdict(answer)) + "\n" for answer in answers)
    file.flush()
    os.fsync(file.fileno())


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


def answers_in_data(
    tokenizer: Tokenizer, prompts: list[Prompt], config: CaptureConfig, ends: set[int]
) -> dict[str, Answer]:
    """The conversations as the data hold them, by their prompts' ids; as many turns as fit.

    Raises:
        ValueError: if a row has no answers, or the template drops or rewrites what it says.
    """
    answers = {}
    for prompt in prompts:
        messages = prompt.answered()
        options = prompt.options(config.template_options)
        turns = turns_from_messages(
            tokenizer, messages, ends=ends, options=options, place=prompt.place
        )
        fit = turns_within(turns, config.max_tokens)
        answers[prompt.id] = Answer(prompt.id, messages, True, False, fit, len(fit) < len(turns))
    return answers


def turns_within(turns: list[Turn], max_tokens: int) -> list[Turn]:
    """The first turns, as many as fit whole."""
    lengths = [len(turn.prompt) + len(turn.answer) for turn in turns]
    return turns[: next((i for i, n in enumerate(lengths) if n > max_tokens), len(turns))]


def drop_too_long(answers: dict[str, Answer], config: CaptureConfig) -> dict[str, Answer]:
    """Leave out conversations without a turn that fits; counts them, and those cut at a turn."""
    fit = {name: answer for name, answer in answers.items() if answer.turns}
    if len(fit) < len(answers):
        what = "prompts" if config.regenerate else "first turns"
        count = f"{len(answers) - len(fit)} of {len(answers)}"
        print(f"{count} {what} are longer than max_tokens and were left out")
    cut = sum(answer.cut for answer in fit.values())
    if cut:
        print(f"{cut} of {len(fit)} conversations do not fit max_tokens: cut at a turn")
    return fit


def require_room(fits: Any, max_tokens: int) -> None:
    """Raise ``ValueError`` if nothing ``fits``: no prompt leaves room for an answer."""
    if not fits:
        raise ValueError(f"max_tokens = {max_tokens} is smaller than every prompt: raise it")


def require_documents(fits: Any, documents: Any, max_tokens: int) -> None:
    """Raise ``ValueError`` if no prompt leaves room for an answer, or none is to be learned."""
    require_room(fits, max_tokens)
    if not documents:
        raise ValueError("no answer has supervised tokens: check chat template and max_new_tokens")


def say_not_asked(prompts: Iterable[Prompt], answers: Mapping[str, Answer]) -> None:
    """Count the conversations whose later turns follow an answer that never ended."""
    pairs = [(prompt, answers[prompt.id]) for prompt in prompts if prompt.id in answers]
    short = sum(not a.finished and not a.cut and len(a.turns) < len(p.turns) for p, a in pairs)
    if short:
        print(
            f"{short} of {len(pairs)} conversations stop at an answer that max_new_tokens cut off: "
            "their later turns are not asked"
        )


def say_past_the_turn(answers: Collection[Answer], tokenizer: Tokenizer) -> None:
    """Count the answers that go on past the token with which the template ends a turn."""
    end = end_of_turn(tokenizer)
    past = sum(any(end in turn.answer[:-1] for turn in answer.turns) for answer in answers)
    if past:
        print(
            f"{past} of {len(answers)} answers go on past {tokenizer.decode([end])!r}, where the "
            "chat template ends a turn: neither the target's generation_config.json nor its "
            "tokenizer has it as eos_token, and vLLM would go on too; name it there, and capture "
            "into another --store"
        )


def end_of_turn(tokenizer: Tokenizer) -> int | None:
    """The special token that the chat template puts after an answer, if there is one."""
    said = "An answer."
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]
    try:
        text = render(tokenizer, messages, None, add_generation_prompt=False).rpartition(said)[2]
    except ValueError:  # the template wants another conversation than this
        return None
    special = tokenizer.all_special_tokens
    ids = tokenizer.encode(text, add_special_tokens=False)
    end = next((i for i in ids if tokenizer.convert_ids_to_tokens(i) in special), None)
    inside = {mark for marks in REASONING for mark in marks}  # such as GPT-OSS' <|end|>
    return end if end is not None and tokenizer.decode([end]) not in inside else None


def cut_torn_line(path: Path) -> None:
    """Take off what a kill left of a line, so that the next one begins well.

    Raises:
        ValueError: if it is no part of an answer, and so of a file that is not ours.
    """
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if content[whole : whole + len(LINE_START)] != LINE_START[: len(content) - whole]:
            raise foreign(path)
        os.truncate(path, whole)


def read_answers(path: Path) -> list[Answer]:
    """Finished lines; the last may be torn, or be written this moment by another process.

    Raises:
        ValueError: for a file that no capture wrote.
    """
    content = path.read_bytes()
    try:
        found = [json.loads(line) for line in content[: content.rfind(b"\n") + 1].splitlines()]
        return [
            Answer(**{**fields, "turns": [Turn(*turn) for turn in fields["turns"]]})
            for fields in found
        ]
    except (ValueError, TypeError, KeyError) as error:
        raise foreign(path) from error


def foreign(path: Path) -> ValueError:
    return ValueError(
        f"{path} was not written by a capture, which would append to it: give another --store"
    )
