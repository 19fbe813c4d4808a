"""Reference speculative decoding: the target's own output, in fewer of its passes.

    prefill -> [ draft K tokens -> verify them in one pass -> keep the right prefix ]*

Greedy decoding keeps drafts while they equal the target's choice, so its output is the target's
token for token. Sampling keeps a draft with the probability that the target gives it and else
draws from the rest of the target's distribution (rejection sampling with a greedy drafter, as
vLLM does by default), so its output has the target's distribution.
"""

import functools
import inspect
import time
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from peagle.decode.drafting import draft, new_cache
from peagle.decode.kv_cache import SlotCache
from peagle.decode.sliding_window import LayerMasks, mask_layers, sliding_window_of_layers
from peagle.kernels.device import synchronize, without_autocast
from peagle.model.drafter import Drafter
from peagle.target.hidden_states import HiddenStates, hidden_states


class Decoded(NamedTuple):
    """What came out of decoding a batch of prompts."""

    tokens: list[list[int]]  # new tokens of each prompt, the end token included
    accepted: list[list[int]]  # drafts accepted in each verification, per prompt
    seconds: float
    draft_seconds: list[float]  # of each round's drafting; the first also reads the prompts


class Verified(NamedTuple):
    """One pass of the target over a pending token and its drafts."""

    accepted: Int[Tensor, " B"]
    next_token: Int[Tensor, " B"]  # what the target says after the accepted drafts


class Decoder:
    """Decodes batches of prompts with a target and, unless K is 0, a drafter.

    Args:
        target: a transformers causal language model whose layers see everything before them, or
            a sliding window of it.
        drafter: trained for this target; may be ``None`` when only K = 0 is used.
        eos_ids: tokens that end an answer.

    Raises:
        ValueError: if the target attends in another way.
    """

    def __init__(self, target: PreTrainedModel, drafter: Drafter | None, *, eos_ids: set[int]):
        self.target, self.drafter, self.eos_ids = target, drafter, eos_ids
        self.layer_ids = tuple(drafter.config.eagle_aux_hidden_state_layer_ids) if drafter else ()
        self.masks = LayerMasks(sliding_window_of_layers(target))

    @torch.no_grad()
    def decode(
        self,
        prompts: list[list[int]],
        *,
        k: int,
        temperature: float,
        max_new_tokens: int,
        generator: torch.Generator | None = None,
    ) -> Decoded:
        """Decode until every prompt has ended or has ``max_new_tokens`` tokens.

        ``k`` drafts per round; 0 decodes with the target alone, by the same code.
        """
        begin = time.perf_counter()
        answers = Answers(len(prompts), max_new_tokens, self.eos_ids)
        with (
            without_autocast(self.target.device),  # outputs are compared token by token
            mask_layers(self.target, self.masks),
            hidden_states(self.target, self.layer_ids) as states,
        ):
            draft_seconds = self.run_rounds(prompts, answers, states, k, temperature, generator)
        seconds = time.perf_counter() - begin
        return Decoded(answers.tokens, answers.accepted, seconds, draft_seconds)

    def run_rounds(
        self,
        prompts: list[list[int]],
        answers: "Answers",
        states: HiddenStates,
        k: int,
        temperature: float,
        generator: torch.Generator | None,
    ) -> list[float]:
        """Draft and verify until all answers have ended; returns the seconds of each drafting."""
        device = self.target.device
        ids, length = padded(prompts, device)
        batch, width = ids.shape
        longest = width + answers.max_new_tokens  # no row that still runs reaches this position
        capacity = longest + 2 * k + 2
        cache = SlotCache(len(self.masks.sliding_windows), capacity)
        draft_cache = new_cache(self.drafter, capacity) if k else None

        position = torch.arange(width, device=device).expand(batch, -1)
        logits = self.run_target(cache, ids, position)
        rows = torch.arange(batch, device=device)
        pending = choose(logits[rows, length - 1], temperature, generator)
        answers.append(pending[:, None], torch.ones_like(length))
        # The slots that the drafter has not read yet: tokens x[p+1] at positions start, ...
        start, count = torch.zeros_like(length), length
        tokens = torch.cat([ids[:, 1:], ids[:, :1]], 1)
        tokens[rows, length - 1] = pending

        draft_seconds = []
        while not answers.finished():
            drafts = ids[:, :0]
            if k:
                begin = self.now()
                aux = states.aux(self.layer_ids).to(self.drafter.dtype)
                drafts = draft(self.drafter, draft_cache, tokens, aux, start, count, num_tokens=k)
                draft_seconds.append(self.now() - begin)
            position = (start + count)[:, None] + torch.arange(k + 1, device=device)
            logits = self.run_target(cache, torch.cat([pending[:, None], drafts], 1), position)
            verified = verify(logits, drafts, temperature, generator)
            # Rows that have finished early go on idly; they stay inside the caches.
            start, count = (start + count).clamp(max=longest), verified.accepted + 1
            pending = verified.next_token
            tokens = torch.cat([drafts, pending[:, None]], 1)
            tokens[rows, verified.accepted] = pending
            answers.append(tokens, count)
            answers.count(verified.accepted)
        return draft_seconds

    def now(self) -> float:
        synchronize(self.target.device)
        return time.perf_counter()

    def run_target(
        self, cache: SlotCache, ids: Int[Tensor, "B q"], position: Int[Tensor, "B q"]
    ) -> Float[Tensor, "B q V"]:
        cache.slots.place(position, limit=int(position.max()) + 1)
        mask = self.masks.place(cache, self.target.dtype)
        cached = {cache_argument(type(self.target)): cache}
        inputs = {"input_ids": ids, "position_ids": position, "attention_mask": mask}
        return self.target(**inputs, **cached).logits


@functools.cache
def cache_argument(target: type[PreTrainedModel]) -> str:
    """What the target calls its cache: transformers 5.24 has a new name for it."""
    known = inspect.signature(target.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


class Answers:
    """The growing answers of a batch, on the CPU."""

    def __init__(self, batch: int, max_new_tokens: int, eos_ids: set[int]):
        self.max_new_tokens, self.eos_ids = max_new_tokens, eos_ids
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.accepted: list[list[int]] = [[] for _ in range(batch)]
        self.ended = [False] * batch
        self.active = list(self.ended)  # before the latest tokens

    def append(self, tokens: Int[Tensor, "B m"], count: Int[Tensor, " B"]) -> None:
        """Add the first ``count`` tokens of each row, up to its end token or length limit."""
        self.active = [not ended for ended in self.ended]
        for row, (new, n) in enumerate(zip(tokens.tolist(), count.tolist(), strict=True)):
            for token in new[:n]:
                if not self.ended[row]:
                    self.tokens[row].append(token)
                    full = len(self.tokens[row]) == self.max_new_tokens
                    self.ended[row] = full or token in self.eos_ids

    def count(self, accepted: Int[Tensor, " B"]) -> None:
        """Note a verification's accepted drafts for the rows that were still running."""
        for row, n in enumerate(accepted.tolist()):
            if self.active[row]:
                self.accepted[row].append(n)

    def finished(self) -> bool:
        return all(self.ended)


def padded(
    prompts: list[list[int]], device: torch.device
) -> tuple[Int[Tensor, "B P"], Int[Tensor, " B"]]:
    """Right-padded prompts and their lengths."""
    ids = pad_sequence([torch.tensor(prompt) for prompt in prompts], batch_first=True)
    return ids.to(device), torch.tensor([len(prompt) for prompt in prompts], device=device)


def choose(
    logits: Float[Tensor, "*B V"], temperature: float, generator: torch.Generator | None
) -> Int[Tensor, " *B"]:
    """The target's next token: its first choice, or a sample."""
    if temperature == 0:
        return logits.argmax(-1)
    return sample(torch.softmax(logits.float() / temperature, -1), generator)


def sample(p: Float[Tensor, "*B V"], generator: torch.Generator | None) -> Int[Tensor, " *B"]:
    drawn = torch.multinomial(p.flatten(0, -2), 1, generator=generator)
    return drawn.view(p.shape[:-1])


def verify(
    logits: Float[Tensor, "B q V"],
    drafts: Int[Tensor, "B K"],
    temperature: float,
    generator: torch.Generator | None,
) -> Verified:
    """Keep the longest prefix of the drafts that the target agrees with, and its next token."""
    batch, k = drafts.shape
    rows = torch.arange(batch, device=drafts.device)
    if temperature == 0:
        choices = logits.argmax(-1)  # [B, K+1]
        accepted = (choices[:, :k] == drafts).long().cumprod(1).sum(1)
        return Verified(accepted, choices[rows, accepted])
    p = torch.softmax(logits.float() / temperature, -1)
    chance = p[:, :k].gather(-1, drafts[..., None])[..., 0]
    luck = torch.rand(batch, k, generator=generator, device=drafts.device)
    accepted = (luck < chance).long().cumprod(1).sum(1)
    rest = p[rows, accepted]  # [B, V]
    refused = accepted < k
    rejected = drafts[rows, accepted.clamp(max=k - 1)] if k else rows
    rest[rows[refused], rejected[refused]] = 0
    return Verified(accepted, sample(rest / rest.sum(-1, keepdim=True), generator))
