"""What an engine is asked while it hands out hidden states: an answer, or a reading of a text."""

import json
from typing import Any, NamedTuple

from peagle.serve.http import Address, posted
from peagle.serve.vllm import MODEL_NAME

ANSWER_TIMEOUT_S = 6 * 3600.0  # of a long answer, with all that waits before it
TOP = 5  # tokens of which an engine says how likely it found them


class Reply(NamedTuple):
    """An answer's tokens, with the one that ended it, and where the states of the text are."""

    tokens: list[int]
    states: str
    likely: list[dict[int, float]]  # for each token, when asked: log probabilities of the likeliest


def ask(
    address: Address,
    prompt: list[int],
    *,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    ends: set[int],
    model: str = MODEL_NAME,
    likely: bool = False,
) -> Reply:
    """An answer, and the states of prompt and answer less its last token, which nothing read.

    Everything that could bend the target's distribution is off, and the tokens that end an answer
    are those that transformers would stop at, not what the engine finds by itself.

    Raises:
        ValueError: if the engine refuses the request, or hands out no states or ids.
        OSError: if it dies, or breaks off the answer.
    """
    body = {
        "max_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "stop_token_ids": sorted(ends),
        "kv_transfer_params": {"include_output_tokens": True},
        **({"logprobs": TOP, "return_tokens_as_token_ids": True} if likely else {}),
    }
    reply = complete(address, model, prompt, body)
    tokens = reply.tokens
    if not tokens or (tokens[-1] not in ends and len(tokens) != max_new_tokens):
        raise OSError(f"the engine broke off an answer after {len(tokens)} tokens")
    return reply


def read(address: Address, text: list[int], *, model: str = MODEL_NAME) -> Reply:
    """The states of a whole text that is known; the one token that vLLM must add is dropped."""
    return complete(address, model, text, {"max_tokens": 1, "temperature": 0.0})


def complete(address: Address, model: str, prompt: list[int], body: dict[str, Any]) -> Reply:
    fixed = {
        "model": model,
        "prompt": prompt,
        "top_p": 1.0,
        "top_k": 0,
        "repetition_penalty": 1.0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    with posted(
        address, "/v1/completions", {**fixed, **body}, timeout_s=ANSWER_TIMEOUT_S
    ) as response:
        content = response.read()
    try:
        reply = json.loads(content)
        choice = reply["choices"][0]
        tokens, likely = choice.get("token_ids"), choice.get("logprobs") or {}
        likely = [numbered(found) for found in likely.get("top_logprobs") or ()]
        path = (reply.get("kv_transfer_params") or {}).get("hidden_states_path")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise OSError(f"the engine answered with {content[:80]!r} and not a completion") from error
    if tokens is None:
        raise ValueError("the engine returns text and no token ids: install vLLM 0.16 or newer")
    if path is None:
        raise ValueError(
            "the engine hands out no hidden states: start it with extract_hidden_states as "
            "docs/data.md shows, or let peagle start it"
        )
    return Reply(tokens, path, likely)


def numbered(found: dict[str, float]) -> dict[int, float]:
    """Log probabilities by token id, which vLLM writes as ``token_id:17``."""
    return {int(name.partition(":")[2]): value for name, value in found.items()}
