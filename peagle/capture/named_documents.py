"""What an answered prompt makes of samples: documents with a name, a place and a split."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from peagle.capture.chat import Document, conversation_id, documents, mask_reasoning
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Answer
from peagle.capture.prompts import Prompt
from peagle.store.index import split_of

MAX_DOCUMENTS = 2**20  # more than one conversation ever makes


class NamedDocument(NamedTuple):
    name: str
    place: int  # in the store's order
    document: Document
    split: str

    @property
    def tokens(self) -> int:
        return len(self.document.input_ids)


class Namer:
    """Makes documents of answers.

    Args:
        prompts: of all processes, in the order of the store.
    """

    def __init__(self, prompts: Iterable[Prompt], tokenizer: Tokenizer, config: CaptureConfig):
        self.places = {prompt.id: number for number, prompt in enumerate(prompts)}
        self.tokenizer, self.config = tokenizer, config

    def documents(self, prompt: Prompt, answer: Answer) -> list[NamedDocument]:
        """A conversation's documents, in one split; those without tokens to train on left out."""
        found = []
        name = conversation_id(answer.messages)
        part = split_of(prompt.asked_id(), self.config.val_share)
        for number, document in enumerate(documents(answer.turns)):
            if self.config.reasoning == "mask":
                document = mask_reasoning(document, self.tokenizer)
            if document.loss_mask.any():
                place = self.places[answer.id] * MAX_DOCUMENTS + number
                sample = f"{name}-{number}" if number else name
                found.append(NamedDocument(sample, place, document, part))
        return found

    def of_all(
        self, prompts: Iterable[Prompt], answers: Mapping[str, Answer]
    ) -> list[NamedDocument]:
        """Documents of the prompts that have an answer, in order; says what has none to train on.

        What is left out is reasoning that hit the length limit, and is masked.
        """
        found, all_documents = [], 0
        for prompt in (prompt for prompt in prompts if prompt.id in answers):
            found += self.documents(prompt, answers[prompt.id])
            all_documents += len(documents(answers[prompt.id].turns))
        if len(found) < all_documents:
            count = all_documents - len(found)
            print(f"{count} answers have nothing to train on and were left out")
        return found
