"""One conversation with the target: prompts of the data, turn by turn, and answers of its own."""

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase as Tokenizer

from peagle.capture.chat import Turn, answer_text, prompt_ids
from peagle.capture.config import CaptureConfig
from peagle.capture.messages import Message
from peagle.capture.prompts import Prompt


@dataclass(frozen=True)
class Answer:
    """A conversation with the target's answers: one line of ``answers.jsonl``."""

    id: str
    messages: list[Message]
    finished: bool  # false: the last answer hit the length limit
    greedy: bool
    turns: list[Turn]  # none: the first prompt leaves no room for an answer
    cut: bool = False  # later turns were left out, because they did not fit


class Conversation:
    """Asks the target turn by turn, within ``max_tokens``. Whoever generates answers drives it."""

    def __init__(self, tokenizer: Tokenizer, prompt: Prompt, config: CaptureConfig):
        self.tokenizer, self.prompt, self.config = tokenizer, prompt, config
        self.messages: list[Message] = prompt.opening()
        self.turns: list[Turn] = []
        self.asked: list[int] = []  # the prompt that waits for its answer
        self.finished, self.cut = True, False

    def next_prompt(self) -> list[int] | None:
        """Token ids of the next turn's prompt; ``None`` when nothing is left to ask, or no room.

        Where the first one leaves no room, there is no turn.
        """
        done = len(self.turns)
        if done == len(self.prompt.turns) or not self.finished or self.cut:
            return None
        messages = list(self.messages)
        if done:
            messages.append({"role": "user", "content": self.prompt.turns[done]})
        options = self.prompt.options(self.config.template_options)
        self.asked = prompt_ids(self.tokenizer, messages, options, self.prompt.place)
        if len(self.asked) >= self.config.max_tokens - 1:
            self.cut = bool(done)
            return None
        self.messages = messages
        return self.asked

    def add_answer(self, answer: list[int], ended: bool) -> None:
        """Take an answer; one that neither ended nor is as long as allowed had no more room."""
        room = self.config.max_tokens - len(self.asked)
        longer = len(answer) > room or not (ended or len(answer) >= self.config.max_new_tokens)
        if self.turns and longer:  # cut at a turn: the first one must fit somehow
            self.messages.pop()
            self.cut = True
            return
        self.turns.append(Turn(self.asked, answer[:room]))
        self.finished = ended and len(answer) <= room
        content = answer_text(self.tokenizer, answer)
        self.messages.append({"role": "assistant", "content": content})

    def to_answer(self, greedy: bool) -> Answer:
        return Answer(self.prompt.id, self.messages, self.finished, greedy, self.turns, self.cut)
