"""Answers from vLLM, which batches everything that is asked at once as it comes.

Only answers: hidden states are read by transformers, whose layers are the convention that a store
keeps. The two never hold the target at the same time. The server starts before transformers loads
the weights, and is gone when the last answer is written.

Every conversation goes on at its own pace, and is kept when it ends. A request has a seed of its
own, made from the run's seed, the prompt and the turn, so that a capture which is resumed, or
shared among processes, draws as an uninterrupted one does. Only rounding depends on what else is
under way.
"""

import json
import sys
from collections.abc import Collection
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from threading import Lock

from transformers import PreTrainedTokenizerBase as Tokenizer

from peagle.capture.answers import Answers
from peagle.capture.config import CaptureConfig
from peagle.capture.conversation import Answer, Conversation
from peagle.capture.prompts import Prompt
from peagle.capture.work_split import PromptBatch
from peagle.serve.http import posted
from peagle.serve.vllm import (
    MODEL_NAME,
    Serving,
    Vllm,
    absolute,
    find_vllm,
    require_architectures,
    serve,
)
from peagle.target.target import TargetSource

IN_FLIGHT = 512  # what has no room in vLLM waits there; 1,024 open files are a usual limit
START_TIMEOUT_S = 3600.0  # it may have to fetch the weights
ANSWER_TIMEOUT_S = 6 * 3600.0  # of a long answer, with all that waits before it


def generate_vllm(
    target: TargetSource, config: CaptureConfig, batches: list[PromptBatch], known: Collection[str]
) -> Answers:
    """Answers to the prompts that are not known, as conversations end; an engine lives meanwhile.

    Raises:
        ValueError: if there is no vLLM that can serve the target, or it refuses a prompt.
        EngineError: if the engine does not come up, or dies; with its last lines.
    """
    missing = [(p, batch.greedy) for batch in batches for p in batch.prompts if p.id not in known]
    if not missing:
        return
    vllm = find_vllm(config.vllm_python, option="--capture.vllm_python")
    text = target.config()
    require_architectures(vllm, text.architectures or ())
    if config.max_tokens > text.max_position_embeddings:
        raise ValueError(
            f"capture.max_tokens = {config.max_tokens} exceeds the {text.max_position_embeddings} "
            "positions of the target, and vLLM serves no more: lower it"
        )
    tokenizer, ends = target.tokenizer(), target.end_tokens()
    print(f"{vllm.name}: starting the engine for {len(missing)} prompts", file=sys.stderr)
    with serve(vllm, serving(target, config, vllm), timeout_s=START_TIMEOUT_S) as server:
        yield from converse_with_all(Client(server.port, tokenizer, ends, config), missing)


def serving(target: TargetSource, config: CaptureConfig, vllm: Vllm) -> Serving:
    """The target alone, in the precision and up to the length of the capture.

    The cache of prefixes is on: a later turn begins with all that was said before.
    """
    return Serving(
        target=absolute(target.path),
        revision=target.revision,
        drafter=None,
        parallel=False,
        k=0,
        dtype=config.dtype,
        max_model_len=config.max_tokens,
        enforce_eager=vllm.device == "cpu",
        prefix_caching=True,
        arguments=tuple(config.vllm_args),
    )


class Client:
    """Has conversations with the served target: several at once, in threads."""

    def __init__(self, port: int, tokenizer: Tokenizer, ends: set[int], config: CaptureConfig):
        self.port, self.tokenizer, self.ends, self.config = port, tokenizer, ends, config
        self.tokenizer_lock = Lock()  # tokenizers are not made for several threads

    def converse(self, prompt: Prompt, greedy: bool) -> Answer:
        """Raises ``ValueError`` with the prompt's name if the engine refuses it."""
        config = self.config
        conversation = Conversation(self.tokenizer, prompt, config)
        while True:
            with self.tokenizer_lock:
                asked = conversation.next_prompt()
            if not asked:
                return conversation.to_answer(greedy)
            try:
                answer = request_completion(
                    self.port,
                    asked,
                    # Not beyond the room that is left, where the answer would be cut anyway.
                    max_new_tokens=min(config.max_new_tokens, config.max_tokens - len(asked)),
                    temperature=0.0 if greedy else config.temperature,
                    seed=config.seed_for(f"{prompt.id} turn {len(conversation.turns)}"),
                    ends=self.ends,
                )
            except ValueError as error:
                raise ValueError(f"prompt {prompt.id}: {error}") from error
            with self.tokenizer_lock:
                conversation.add_answer(answer, answer[-1] in self.ends)


def converse_with_all(client: Client, missing: list[tuple[Prompt, bool]]) -> Answers:
    """Conversations as they end, in no order."""
    waiting, under_way = iter(missing), set[Future[Answer]]()
    pool = ThreadPoolExecutor(IN_FLIGHT)
    try:
        while True:
            room = IN_FLIGHT - len(under_way)
            under_way |= {pool.submit(client.converse, *item) for item in islice(waiting, room)}
            if not under_way:
                return
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            yield [future.result() for future in done if future.exception() is None]
            for future in done:
                future.result()  # raises what went wrong
    finally:
        # After an error nobody waits for the answers under way: they end with the engine.
        pool.shutdown(wait=False, cancel_futures=True)


def request_completion(
    port: int,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    ends: set[int],
) -> list[int]:
    """The tokens of one answer, with the one that ended it.

    Everything that could bend the target's distribution is off, and the tokens that end an answer
    are those that transformers would stop at, not what the engine finds by itself.

    Raises:
        ValueError: if the engine refuses the request, or is too old for it.
        OSError: if it dies, or breaks off the answer.
    """
    body = {
        "model": MODEL_NAME,
        "prompt": prompt,
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "stop_token_ids": sorted(ends),
        "return_token_ids": True,
    }
    with posted(port, "/v1/completions", body, timeout_s=ANSWER_TIMEOUT_S) as response:
        content = response.read()
    tokens = read_token_ids(content)
    if not tokens or (tokens[-1] not in ends and len(tokens) != max_new_tokens):
        raise OSError(f"the engine broke off an answer after {len(tokens)} tokens")
    return tokens


def read_token_ids(content: bytes) -> list[int]:
    try:
        tokens = json.loads(content)["choices"][0].get("token_ids")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f"the engine answered with {content[:80]!r} and not a completion") from error
    if tokens is None:
        raise ValueError("the engine returns text and no token ids: install vLLM 0.16 or newer")
    return tokens
