"""Asking an engine over HTTP: streamed completions under a fixed concurrency, and its counters."""

import json
import re
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

from peagle.progress import track
from peagle.serve.http import posted, request
from peagle.serve.vllm import MODEL_NAME

REQUEST_TIMEOUT_S = 1800.0


class Question(NamedTuple):
    """One request."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float


class Answer(NamedTuple):
    """One request's outcome, as its client saw it."""

    tokens: list[int]
    seconds: float  # until the last token
    first_token_seconds: float


class Load(NamedTuple):
    """All requests of one run."""

    answers: list[Answer]
    seconds: float


class Counters(NamedTuple):
    """vLLM's own counts of speculative decoding since its start.

    A draft is one verification of one request. Drafts accepted after the end of an answer count,
    as in peagle's own loop: vLLM counts before it cuts the answer off.
    """

    drafts: int
    accepted: int
    per_position: list[int]

    def since(self, earlier: "Counters") -> "Counters":
        before = earlier.per_position or [0] * len(self.per_position)
        return Counters(
            self.drafts - earlier.drafts,
            self.accepted - earlier.accepted,
            [now - then for now, then in zip(self.per_position, before, strict=True)],
        )


def ask(port: int, question: Question) -> Answer:
    """One streamed completion.

    Raises:
        ValueError: if the engine refuses the request, with its reason.
        OSError: if it does not answer.
    """
    body = {
        "model": MODEL_NAME,
        "prompt": question.prompt,
        "max_tokens": question.max_new_tokens,
        "temperature": question.temperature,
        "stream": True,
        "return_token_ids": True,
    }
    begin = time.perf_counter()
    first, tokens = None, []
    for event in events(port, "/v1/completions", body):
        new = event["choices"][0].get("token_ids") or []
        if new and first is None:
            first = time.perf_counter() - begin
        tokens += new
    seconds = time.perf_counter() - begin
    if first is None:
        raise OSError("the engine ended an answer without a token")
    return Answer(tokens, seconds, first)


def events(port: int, path: str, body: dict):
    """The JSON objects of a server-sent stream."""
    with posted(port, path, body, timeout_s=REQUEST_TIMEOUT_S) as response:
        for line in response:
            data = line.strip().removeprefix(b"data:").strip()
            if data == b"[DONE]":
                return
            if data:
                event = json.loads(data)
                if "error" in event:
                    raise OSError(f"the engine broke off an answer: {event['error']}")
                yield event
        raise OSError("the engine broke off an answer")


def closed_loop(
    port: int, questions: Sequence[Question], concurrency: int, *, what: str = "answers"
) -> Load:
    """Ask everything with ``concurrency`` clients, each sending its next request at once.

    Where that takes long, lines (or a bar) named ``what`` say how far it is.
    """
    begin = time.perf_counter()
    clients = ThreadPoolExecutor(concurrency)
    try:
        found = clients.map(partial(ask, port), questions)
        answers = list(track(what, found, len(questions), unit="answers"))
        return Load(answers, time.perf_counter() - begin)
    finally:
        # After an error nobody waits for the answers under way: they end with the engine.
        clients.shutdown(wait=False, cancel_futures=True)


def read_counters(port: int) -> Counters:
    with request(port, "GET", "/metrics", timeout_s=60.0) as response:
        return parse_counters(response.read().decode())


def parse_counters(text: str) -> Counters:
    """Read the counters from Prometheus text; several engines behind one server are added up."""
    totals: dict[str, int] = {}
    pattern = r"^vllm:spec_decode_num_(\w+?)(?:_total)?\{([^}]*)\} (\S+)$"
    for name, labels, value in re.findall(pattern, text, re.MULTILINE):
        position = re.search(r'position="(\d+)"', labels)
        key = f"{name}/{position[1]}" if position else name
        totals[key] = totals.get(key, 0) + int(float(value))
    depth = sum(key.startswith("accepted_tokens_per_pos/") for key in totals)
    return Counters(
        totals.get("drafts", 0),
        totals.get("accepted_tokens", 0),
        [totals[f"accepted_tokens_per_pos/{i}"] for i in range(depth)],
    )
