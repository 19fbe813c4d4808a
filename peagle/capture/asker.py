"""Has conversations with the target, and has it read texts, at engines that hand out states.

Each request comes back with the hidden states of its prompt and answer. Every conversation goes on
at its own pace. A request has a seed of its own, made from the run's seed, the prompt and the turn,
so that a capture which is resumed, or shared among processes, draws as an uninterrupted one does.
Only rounding depends on what else is under way.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from threading import Lock
from typing import NamedTuple

from jaxtyping import BFloat16
from torch import Tensor
from torch.nn import functional as F

from peagle.capture import engine_request
from peagle.capture.chat import Document
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Answer, Conversation
from peagle.capture.engine_states import check_logits, take_states
from peagle.capture.engines import Engine, Engines
from peagle.capture.prompts import Prompt
from peagle.store.manifest import Manifest
from peagle.store.sample import Sample
from peagle.target.head import TargetHead
from peagle.target.target import TargetSource

IN_FLIGHT = 512  # what has no room in vLLM waits there; 1,024 open files are a usual limit
PROBE_TOKENS = 16
SAME = 0.05  # relative error of states that differ by rounding


class Reading(NamedTuple):
    """A text, and the states of all its tokens but the last, which no engine has read."""

    text: list[int]
    aux: BFloat16[Tensor, "m AD"]
    final: BFloat16[Tensor, "m T"]

    def sample(self, document: Document) -> Sample:
        """A document's sample. No slot needs the states of its last token: they are zero."""
        return Sample(*document, *(F.pad(states, (0, 0, 0, 1)) for states in self[1:]))


class Question(NamedTuple):
    """A conversation to be had, or one that is known, with the texts that are to be read."""

    prompt: Prompt
    greedy: bool
    answer: Answer | None = None
    texts: tuple[list[int], ...] = ()


class Asker:
    """Has conversations with the target, and has it read texts: several at once, in threads."""

    def __init__(
        self, engines: Engines, target: TargetSource, config: CaptureConfig, manifest: Manifest
    ):
        self.engines, self.config, self.manifest = engines, config, manifest
        self.tokenizer, self.ends = target.tokenizer(), target.end_tokens()
        self.tokenizer_lock = Lock()  # tokenizers are not made for several threads

    def settle(self, question: Question) -> tuple[Answer, list[Reading]]:
        """The conversation with its readings, turn by turn, or those of the texts.

        Raises:
            ValueError: with the prompt's name, if the engine refuses it or its states are wrong.
            OSError: if no engine is left.
        """
        try:
            if question.answer is not None:
                return question.answer, [self.read(text) for text in question.texts]
            return self.converse(question.prompt, question.greedy)
        except ValueError as error:
            raise ValueError(f"prompt {question.prompt.id}: {error}") from error

    def converse(self, prompt: Prompt, greedy: bool) -> tuple[Answer, list[Reading]]:
        conversation, readings = Conversation(self.tokenizer, prompt, self.config), []
        while True:
            with self.tokenizer_lock:
                asked = conversation.next_prompt()
            if not asked:
                return conversation.to_answer(greedy), readings
            turn = f"{prompt.id} turn {len(conversation.turns)}"
            answer, reading = self.answer(asked, greedy, seed=self.config.seed_for(turn))
            readings.append(reading)
            with self.tokenizer_lock:
                conversation.add_answer(answer, answer[-1] in self.ends)

    def answer(self, asked: list[int], greedy: bool, *, seed: int) -> tuple[list[int], Reading]:
        def question(engine: Engine) -> tuple[list[int], Reading]:
            reply = engine_request.ask(
                engine.address,
                asked,
                # Not beyond the room that is left, where the answer would be cut anyway.
                max_new_tokens=min(self.config.max_new_tokens, self.config.max_tokens - len(asked)),
                temperature=0.0 if greedy else self.config.temperature,
                seed=seed,
                ends=self.ends,
                model=engine.model,
            )
            text = asked + reply.tokens
            return reply.tokens, Reading(text, *take_states(reply.states, text[:-1], self.manifest))

        return self.engines.ask(question)

    def read(self, text: list[int]) -> Reading:
        def question(engine: Engine) -> Reading:
            reply = engine_request.read(engine.address, text[:-1], model=engine.model)
            return Reading(text, *take_states(reply.states, text[:-1], self.manifest))

        return self.engines.ask(question)

    def check(self, head: TargetHead, questions: Iterable[Question]) -> None:
        """Raise ``ValueError`` unless every engine serves this target, and every token's states.

        Each answers the first prompt, and reads it once more: with its cache of prefixes on, there
        would be no states for what it has read before.
        """
        prompts = (self.first_prompt(question) for question in questions)
        prompt = next((prompt for prompt in prompts if prompt), None)
        for engine in self.engines.alive if prompt else ():
            reply = engine_request.ask(
                engine.address,
                prompt,
                max_new_tokens=min(PROBE_TOKENS, self.config.max_tokens - len(prompt)),
                temperature=0.0,
                seed=0,
                ends=self.ends,
                model=engine.model,
                likely=True,
            )
            text = [*prompt, *reply.tokens[:-1]]
            aux, final = take_states(reply.states, text, self.manifest)
            check_logits(head, final, reply)
            again = engine_request.read(engine.address, prompt, model=engine.model)
            once_more, _ = take_states(again.states, prompt, self.manifest)
            aux = aux[: len(prompt)].float()
            if not (once_more - aux).norm() < SAME * aux.norm():
                raise ValueError(
                    f"engine {engine.address} hands out other hidden states when it reads a text "
                    "again: switch its prefix caching off (--no-enable-prefix-caching)"
                )

    def first_prompt(self, question: Question) -> list[int] | None:
        """What a conversation begins with; none where it leaves no room for an answer."""
        if question.answer is not None:
            return question.answer.turns[0].prompt if question.answer.turns else None
        return Conversation(self.tokenizer, question.prompt, self.config).next_prompt()


def settle_all(
    asker: Asker, questions: Iterable[Question]
) -> Iterator[tuple[Question, Answer, list[Reading]]]:
    """Conversations as they end, in no order; after an error, those that were at their end."""
    waiting, under_way = iter(questions), dict[Future, Question]()
    pool = ThreadPoolExecutor(IN_FLIGHT)
    try:
        while True:
            for question in islice(waiting, IN_FLIGHT - len(under_way)):
                under_way[pool.submit(asker.settle, question)] = question
            if not under_way:
                return
            done, _ = wait(under_way, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: future.exception() is not None):
                yield under_way.pop(future), *future.result()  # raises what went wrong
    finally:
        # After an error nobody waits for the answers under way: they end with the engine.
        pool.shutdown(wait=False, cancel_futures=True)
