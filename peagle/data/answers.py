"""The target answers the prompts: greedily or sampled, batch by batch, resumable after a kill."""

import hashlib
import json
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peagle.data.capture_config import CaptureConfig
from peagle.data.chat import (
    REASONING,
    Message,
    Options,
    Turn,
    fitting,
    prompt_ids,
    turns_of,
)
from peagle.data.prompts import Prompt
from peagle.model.target import end_tokens


@dataclass(frozen=True)
class Answer:
    """One conversation with the target's answers."""

    id: str
    messages: list[Message]
    finished: bool  # false: the last answer hit the length limit
    greedy: bool
    turns: list[Turn] | None = None  # None in files of earlier versions
    cut: bool = False  # later turns were left out, because they did not fit

    def said(
        self, tokenizer: PreTrainedTokenizerBase, ends: set[int], options: Options | None
    ) -> list[Turn]:
        """The turns as the target had and said them, token by token."""
        if self.turns is not None:
            return self.turns
        return turns_of(
            tokenizer, self.messages, ends=ends, options=options, finished=self.finished
        )


def regenerate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    config: CaptureConfig,
    path: Path,
) -> list[Answer]:
    """The target's answers to all prompts, appended to ``path`` as they come."""
    done = read_answers(path)
    known = {answer.id for answer in done}
    refuse_other_prompts(done, prompts, path)
    groups = {
        greedy: [p for p in prompts if p.id not in known and is_greedy(p, config) == greedy]
        for greedy in (True, False)
    }
    batches = [
        (greedy, group[start : start + config.batch_size])
        for greedy, group in groups.items()
        for start in range(0, len(group), config.batch_size)
    ]
    room = config.max_tokens - 1
    too_long = 0
    with (
        open(path, "a", encoding="utf-8") as file,
        tqdm(total=len(prompts), initial=len(done), desc="answers", disable=None) as bar,
    ):
        for greedy, batch in batches:
            kept = [p for p in batch if len(first_prompt(tokenizer, p, config)) < room]
            too_long += len(batch) - len(kept)
            fresh = answer_batch(model, tokenizer, kept, greedy, config) if kept else []
            file.writelines(json.dumps(asdict(answer)) + "\n" for answer in fresh)
            file.flush()
            os.fsync(file.fileno())
            done += fresh
            bar.update(len(batch))
    if too_long:
        print(f"{too_long} of {len(prompts)} prompts are longer than max_tokens and were left out")
    return counted(done, config)


def refuse_other_prompts(answers: list[Answer], prompts: list[Prompt], path: Path) -> None:
    """Raise ``ValueError`` when a row that was answered now asks something else.

    A data set on the Hub may change under its name.
    """
    asked = {prompt.id: prompt.opening() for prompt in prompts}
    for answer in answers:
        opening = asked.get(answer.id, answer.messages)
        if answer.messages[: len(opening)] != opening:
            raise ValueError(
                f"{path} answers other prompts: {answer.id} has changed since; capture into "
                "another --store, or delete this one"
            )


def counted(answers: list[Answer], config: CaptureConfig) -> list[Answer]:
    """Say how many conversations were cut; raise ``ValueError`` when none is left."""
    if not answers:
        raise ValueError(f"max_tokens = {config.max_tokens} is smaller than every prompt: raise it")
    cut = sum(answer.cut for answer in answers)
    if cut:
        print(f"{cut} of {len(answers)} conversations do not fit max_tokens: cut at a turn")
    return answers


def given(
    tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], config: CaptureConfig, ends: set[int]
) -> list[Answer]:
    """The conversations as the data hold them, answers included.

    Raises:
        ValueError: if a row has no answers, or the template drops or rewrites what it says.
    """
    answers, too_long = [], 0
    for prompt in prompts:
        if not prompt.messages:
            raise ValueError(
                f"prompt {prompt.id} has no answers in the data: set regenerate: true, or name "
                "the column with whole conversations"
            )
        last = max(i for i, m in enumerate(prompt.messages) if m["role"] == "assistant")
        messages = list(prompt.messages[: last + 1])
        options = options_for(prompt, config)
        turns = turns_of(tokenizer, messages, ends=ends, options=options)
        fit = fitting(turns, config.max_tokens)
        too_long += not fit
        if fit:
            cut = len(fit) < len(turns)
            answers.append(Answer(prompt.id, messages, True, False, fit, cut))
    if too_long:
        print(f"{too_long} of {len(prompts)} first turns are longer than max_tokens: left out")
    return counted(answers, config)


def options_for(prompt: Prompt, config: CaptureConfig) -> Options:
    tools = {"tools": list(prompt.tools)} if prompt.tools else {}
    return {**(config.template_options or {}), **tools}


def first_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, config: CaptureConfig
) -> list[int]:
    return prompt_ids(tokenizer, prompt.opening(), options_for(prompt, config))


def read_answers(path: Path) -> list[Answer]:
    """Finished lines of an earlier run; a line torn by a kill is cut off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    found = [json.loads(line) for line in whole.decode().splitlines()]
    for fields in found:
        if fields.get("turns") is not None:
            fields["turns"] = [Turn(*turn) for turn in fields["turns"]]
    return [Answer(**fields) for fields in found]


def is_greedy(prompt: Prompt, config: CaptureConfig) -> bool:
    return number_of(f"{config.seed} {prompt.id}") < config.greedy_share * 2**32


def number_of(text: str) -> int:
    """A number below 2**32 that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4])


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    greedy: bool,
    config: CaptureConfig,
) -> list[Answer]:
    """Answer every turn of a batch of conversations, turn by turn."""
    talks = [Talk(tokenizer, prompt, config) for prompt in prompts]
    torch.manual_seed(
        int(hashlib.sha256(f"{config.seed} {prompts[0].id}".encode()).hexdigest()[:8], 16)
    )
    while active := [talk for talk in talks if talk.ask()]:
        said = generate(model, tokenizer, [talk.pending for talk in active], greedy, config)
        for talk, (answer, ended) in zip(active, said, strict=True):
            talk.hear(answer, ended)
    return [talk.answer(greedy) for talk in talks]


class Talk:
    """A conversation that the target is having: prompts of the data, answers of its own."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, config: CaptureConfig):
        self.tokenizer, self.prompt, self.config = tokenizer, prompt, config
        self.messages: list[Message] = prompt.opening()
        self.turns: list[Turn] = []
        self.pending: list[int] = []
        self.finished, self.cut = True, False

    def ask(self) -> bool:
        """Render the next turn's prompt; false when nothing is left to ask, or no room."""
        done = len(self.turns)
        if done == len(self.prompt.turns) or not self.finished or self.cut:
            return False
        asked = list(self.messages)
        if done:
            asked.append({"role": "user", "content": self.prompt.turns[done]})
        self.pending = prompt_ids(self.tokenizer, asked, options_for(self.prompt, self.config))
        self.cut = bool(done) and len(self.pending) >= self.config.max_tokens - 1
        if not self.cut:
            self.messages = asked
        return not self.cut

    def hear(self, answer: list[int], ended: bool) -> None:
        room = self.config.max_tokens - len(self.pending)
        if self.turns and len(answer) > room:  # cut at a turn: the first one must fit somehow
            self.messages.pop()
            self.cut = True
            return
        self.turns.append(Turn(self.pending, answer[:room]))
        self.finished = ended and len(answer) <= room
        self.messages.append({"role": "assistant", "content": words(self.tokenizer, answer)})

    def answer(self, greedy: bool) -> Answer:
        return Answer(self.prompt.id, self.messages, self.finished, greedy, self.turns, self.cut)


def words(tokenizer: PreTrainedTokenizerBase, answer: list[int]) -> str:
    """What an answer says, as the history of the next turn holds it: without reasoning."""
    raw = text = tokenizer.decode(answer, skip_special_tokens=False)
    for begin, end in REASONING:
        text = re.sub(f"{re.escape(begin)}.*?({re.escape(end)}|$)", "", text, flags=re.DOTALL)
    text = text.rpartition("<|message|>")[2]  # harmony: the last channel is the final one
    if text == raw:
        return tokenizer.decode(answer, skip_special_tokens=True)
    for token in tokenizer.all_special_tokens:
        text = text.replace(token, "")
    return text.lstrip("\n")


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    greedy: bool,
    config: CaptureConfig,
) -> list[tuple[list[int], bool]]:
    """The next answer of each conversation, and whether it ended by itself."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    ends = end_tokens(model)
    sampling = {} if greedy else {"temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        do_sample=not greedy,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        # The target's own defaults must not bend its distribution: serving is drafted without them.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        **sampling,
    )[:, width:].cpu()
    answers = []
    for row in out.tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), None)
        answers.append((row[:stop], stop is not None))
    return answers
