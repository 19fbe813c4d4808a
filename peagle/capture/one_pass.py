"""Answers *and* hidden states from vLLM, in the pass that writes the answer.

No other model holds the target meanwhile. A conversation is kept when it ends: first its answers,
then its states. What is known already (answers in the data, or of a capture that was killed) is
read once.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TextIO

import torch

from peagle.capture.answers import (
    answers_in_data,
    append_answers,
    drop_too_long,
    known_answers,
    require_documents,
    say_not_asked,
    say_past_the_turn,
)
from peagle.capture.asker import Asker, Question, Reading, settle_all
from peagle.capture.conversation import Answer
from peagle.capture.engines import (
    Engines,
    find_able_vllm,
    own_engine,
    running_engines,
    serving,
)
from peagle.capture.extract import open_writer
from peagle.capture.identity import PARTIAL
from peagle.capture.named_documents import Namer
from peagle.capture.prompts import Prompt
from peagle.capture.work_split import Share
from peagle.progress import progress
from peagle.serve.vllm import Vllm
from peagle.store.manifest import Manifest
from peagle.store.writer import StoreWriter
from peagle.target.from_files import head_from_files
from peagle.target.head import TargetHead


class OnePass:
    """One process's share of a capture."""

    def __init__(self, share: Share):
        self.target, self.manifest, self.config = share.target, share.manifest, share.config
        self.share = share
        self.namer = Namer(share.prompts, share.target.tokenizer(), share.config)
        self.writer: StoreWriter = open_writer(
            share.manifest, share.config, share.folder, share.split.first_shard
        )
        self.done = {entry.place for entry in self.writer.done}
        self.asked = [(p, batch.greedy) for batch in share.batches for p in batch.prompts]
        self.partial = share.folder / PARTIAL
        self.states_folder = self.partial / share.split.own_file("states")

    def run(self) -> TargetHead:
        """Ask and read what is missing; raises what an engine, a prompt or the disk does."""
        answers = self.known()
        questions = [
            question
            for prompt, greedy in self.asked
            if (question := self.question(prompt, greedy, answers.get(prompt.id)))
        ]
        vllm = None
        if questions and not self.config.servers:
            vllm = find_able_vllm(self.target, self.config)
            self.note_version(vllm)
        head = head_from_files(self.target, getattr(torch, self.config.dtype))
        if questions:
            with self.engines(vllm, questions) as engines:
                asker = Asker(engines, self.target, self.config, self.manifest)
                asker.check(head, questions)
                answers |= self.settle(asker, questions)
        self.report(answers)
        return head

    def note_version(self, vllm: Vllm) -> None:
        """Write into the unfinished manifest which vLLM began it, or say that another did."""
        begun = Manifest.read(self.partial)
        if begun.engine is None:  # by servers, which do not say
            return
        name, version = begun.engine["name"], begun.engine["version"]
        if (name, version) == ("vllm", None):
            engine = {**begun.engine, "version": vllm.version}
            replace(begun, engine=engine).write(self.partial)
        elif (name, version) != ("vllm", vllm.version):
            print(f"begun with {name} {version}, goes on with vllm {vllm.version}: they round "
                  "differently", file=sys.stderr)  # fmt: skip

    def known(self) -> dict[str, Answer]:
        """Answers that are there, by prompt."""
        prompts = [prompt for prompt, _ in self.asked]
        if self.config.regenerate:
            found = known_answers(prompts, self.share.answers_path)
            return {prompt.id: found[prompt.id] for prompt in prompts if prompt.id in found}
        ends = self.target.end_tokens()
        return answers_in_data(self.namer.tokenizer, prompts, self.config, ends)

    def engines(
        self, vllm: Vllm | None, questions: list[Question]
    ) -> AbstractContextManager[Engines]:
        """The servers that the user names, or one of ours."""
        if vllm is None:
            return nullcontext(Engines(running_engines(self.config.servers)))
        known = sum(question.answer is not None for question in questions)
        counts = {"prompts": len(questions) - known, "known answers": known}
        work = " and ".join(f"{count} {what}" for what, count in counts.items() if count)
        print(f"{vllm.name}: starting the engine for {work}", file=sys.stderr)
        folder = self.states_folder
        own = serving(self.target, self.config, vllm, self.manifest, folder)
        return own_engine(vllm, own, folder)

    def settle(self, asker: Asker, questions: list[Question]) -> dict[str, Answer]:
        """Keep conversations as they end; after an error, all that ended before it."""
        answers, done = {}, len(self.asked) - len(questions)
        with (
            open(self.share.answers_path, "a", encoding="utf-8") as file,
            progress("answers", len(self.asked), done=done) as bar,
        ):
            try:
                for question, answer, readings in settle_all(asker, questions):
                    self.keep(question, answer, readings, file)
                    answers[answer.id] = answer
                    bar.update()
            finally:
                self.writer.flush()
        return answers

    def question(self, prompt: Prompt, greedy: bool, answer: Answer | None) -> Question | None:
        """What is to be asked for a prompt, if anything is."""
        if answer is None:
            return Question(prompt, greedy)
        missing = [d for d in self.namer.documents(prompt, answer) if d.place not in self.done]
        texts = tuple(member.document.input_ids.tolist() for member in missing)
        return Question(prompt, greedy, answer, texts) if texts else None

    def keep(
        self, question: Question, answer: Answer, readings: list[Reading], file: TextIO
    ) -> None:
        """Note a conversation, then its samples: a document's states are of its last turn."""
        if question.answer is None:
            append_answers(file, [answer])
        by_text = {tuple(reading.text): reading for reading in readings}
        for name, place, document, part in self.namer.documents(question.prompt, answer):
            if question.answer is None or place not in self.done:
                reading = by_text[tuple(document.input_ids.tolist())]
                self.writer.append(name, part, reading.sample(document), place)

    def report(self, answers: dict[str, Answer]) -> None:
        """Say what was left out.

        Raises:
            ValueError: if there is nothing to train on.
        """
        if self.config.regenerate:
            say_past_the_turn(answers.values(), self.namer.tokenizer)
            say_not_asked([prompt for prompt, _ in self.asked], answers)
        fit = drop_too_long(answers, self.config)
        found = self.namer.of_all([prompt for prompt, _ in self.asked], fit)
        if self.share.split.count == 1:  # else others may have all the work
            require_documents(fit, found, self.config.max_tokens)
