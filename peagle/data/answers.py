"""The target answers the prompts: greedily or sampled, batch by batch, resumable after a kill."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from peagle.data.capture_config import CaptureConfig
from peagle.data.chat import Message, prompt_ids
from peagle.data.prompts import Prompt
from peagle.model.target import end_tokens


@dataclass(frozen=True)
class Answer:
    """One conversation with the target's answers."""

    id: str
    messages: list[Message]
    finished: bool  # false: the last answer hit the length limit
    greedy: bool


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
            kept = [p for p in batch if len(prompt_ids(tokenizer, p.opening())) < room]
            too_long += len(batch) - len(kept)
            fresh = answer_batch(model, tokenizer, kept, greedy, config) if kept else []
            file.writelines(json.dumps(asdict(answer)) + "\n" for answer in fresh)
            file.flush()
            os.fsync(file.fileno())
            done += fresh
            bar.update(len(batch))
    if too_long:
        print(f"{too_long} of {len(prompts)} prompts are longer than max_tokens and were left out")
    if not done:
        raise ValueError(f"max_tokens = {config.max_tokens} is smaller than every prompt: raise it")
    return done


def read_answers(path: Path) -> list[Answer]:
    """Finished lines of an earlier run; a line torn by a kill is cut off the file."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [Answer(**json.loads(line)) for line in whole.decode().splitlines()]


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
    talks = [prompt.opening() for prompt in prompts]
    finished = [True] * len(prompts)
    torch.manual_seed(
        int(hashlib.sha256(f"{config.seed} {prompts[0].id}".encode()).hexdigest()[:8], 16)
    )
    for turn in range(max(len(prompt.turns) for prompt in prompts)):
        active = [i for i, p in enumerate(prompts) if turn < len(p.turns) and finished[i]]
        if not active:
            break
        if turn:
            for i in active:
                talks[i].append({"role": "user", "content": prompts[i].turns[turn]})
        texts, ended = generate(model, tokenizer, [talks[i] for i in active], greedy, config)
        for i, text, end in zip(active, texts, ended, strict=True):
            talks[i].append({"role": "assistant", "content": text})
            finished[i] = end
    return [
        Answer(prompt.id, talk, end, greedy)
        for prompt, talk, end in zip(prompts, talks, finished, strict=True)
    ]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    talks: list[list[Message]],
    greedy: bool,
    config: CaptureConfig,
) -> tuple[list[str], list[bool]]:
    """The next answer of each conversation, and whether it ended by itself."""
    prompts = [prompt_ids(tokenizer, talk) for talk in talks]
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
        **sampling,
    )[:, width:].cpu()
    texts, ended = [], []
    for row in out.tolist():
        stop = next((i for i, token in enumerate(row) if token in ends), len(row))
        texts.append(tokenizer.decode(row[:stop], skip_special_tokens=True))
        ended.append(stop < len(row))
    return texts, ended
