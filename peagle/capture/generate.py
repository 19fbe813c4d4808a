"""Answers from transformers, batch by batch. vLLM's are in ``one_pass.py``."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from peagle.capture.answers import Answers
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Answer, Conversation
from peagle.capture.work_split import PromptBatch
from peagle.target.end_tokens import end_tokens


def generate_transformers(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    config: CaptureConfig,
    batches: list[PromptBatch],
    known: Collection[str],
) -> Answers:
    """Whole batches, known answers included: which tokens are drawn depends on all of them."""
    for batch in batches:
        yield answer_batch(model, tokenizer, batch, config)


@torch.no_grad()
def answer_batch(
    model: PreTrainedModel, tokenizer: Tokenizer, batch: PromptBatch, config: CaptureConfig
) -> list[Answer]:
    """Answer a batch of conversations, turn by turn; prompts that leave no room get no turn."""
    conversations = [Conversation(tokenizer, prompt, config) for prompt in batch.prompts]
    active = [conversation for conversation in conversations if conversation.next_prompt()]
    if active:
        torch.manual_seed(config.seed_for(active[0].prompt.id))
    while active:
        prompts = [conversation.asked for conversation in active]
        answers = generate(model, tokenizer, prompts, batch.greedy, config)
        for conversation, (answer, ended) in zip(active, answers, strict=True):
            conversation.add_answer(answer, ended)
        active = [conversation for conversation in active if conversation.next_prompt()]
    return [conversation.to_answer(batch.greedy) for conversation in conversations]


def generate(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    prompts: list[list[int]],
    greedy: bool,
    config: CaptureConfig,
) -> list[tuple[list[int], bool]]:
    """The next answer of each conversation, and whether it ended by itself."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(rows, batch_first=True, padding_value=pad, padding_side="left")
    mask = pad_sequence([row.new_ones(len(row)) for row in rows], True, padding_side="left")
    ends = end_tokens(model, tokenizer)
    sampling = {} if greedy else {"temperature": config.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        do_sample=not greedy,
        max_new_tokens=config.max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
        **sampling,
    )
    with only(settings, model):
        out = model.generate(input_ids=ids.to(model.device), attention_mask=mask.to(model.device))
    answers = []
    for row in out[:, ids.shape[1] :].tolist():
        stop = next((i + 1 for i, token in enumerate(row) if token in ends), None)
        answers.append((row[:stop], stop is not None))
    return answers


@contextmanager
def only(settings: GenerationConfig, model: PreTrainedModel) -> Iterator[None]:
    """Take away the target's own settings (beams, min_p and more), which ``generate`` adds.

    They must not bend its distribution: serving is drafted without them.
    """
    own, model.generation_config = model.generation_config, settings
    try:
        yield
    finally:
        model.generation_config = own
