"""The target talks: prompts of the data, turn by turn, with answers of its own."""

import hashlib
import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peagle.capture.chat import REASONING, Message, Turn, prompt_ids
from peagle.capture.config import CaptureConfig
from peagle.capture.prompts import Prompt
from peagle.target.end_tokens import end_tokens


@dataclass(frozen=True)
class Answer:
    """One conversation with the target's answers."""

    id: str
    messages: list[Message]
    finished: bool  # false: the last answer hit the length limit
    greedy: bool
    turns: list[Turn]  # none: the first prompt leaves no room for an answer
    cut: bool = False  # later turns were left out, because they did not fit


def first_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, config: CaptureConfig
) -> list[int]:
    return prompt_ids(tokenizer, prompt.opening(), prompt.options(config.template_options))


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
        """Render the next turn's prompt; false when nothing is left to ask, or no room.

        Where the first one leaves no room, there is no turn.
        """
        done = len(self.turns)
        if done == len(self.prompt.turns) or not self.finished or self.cut:
            return False
        asked = list(self.messages)
        if done:
            asked.append({"role": "user", "content": self.prompt.turns[done]})
        self.pending = prompt_ids(
            self.tokenizer, asked, self.prompt.options(self.config.template_options)
        )
        full = len(self.pending) >= self.config.max_tokens - 1
        self.cut = bool(done) and full
        if not full:
            self.messages = asked
        return not full

    def hear(self, answer: list[int], ended: bool) -> None:
        """Take an answer; one that neither ended nor is as long as allowed had no more room."""
        room = self.config.max_tokens - len(self.pending)
        longer = len(answer) > room or not (ended or len(answer) >= self.config.max_new_tokens)
        if self.turns and longer:  # cut at a turn: the first one must fit somehow
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
