"""Hidden states that an engine left in a file: read once, checked, deleted."""

from pathlib import Path

import torch
from jaxtyping import BFloat16, Float
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from peagle.capture.engine_request import Reply
from peagle.store.locks import locked
from peagle.store.manifest import Manifest
from peagle.target.head import TargetHead


def take_states(
    path: str, text: list[int], manifest: Manifest
) -> tuple[BFloat16[Tensor, "n AD"], BFloat16[Tensor, "n T"]]:
    """``aux`` and ``final`` of a text of ``n`` tokens, from a file that is gone afterwards.

    Args:
        text: what the engine read.

    Raises:
        ValueError: if the file is not here, or the states are not those of the text.
        OSError: if the file is torn, because its engine died.
    """
    file = Path(path)
    lock = file.with_name(f"{file.name}.lock")
    if not (file.exists() or lock.exists()):
        raise ValueError(
            f"the engine wrote hidden states to {path}, which is not to be seen here: give it a "
            "shared_storage_path that both sides see"
        )
    try:
        with locked(lock, shared=True):  # the engine holds it until the file is whole
            found = load_file(file)
    except (SafetensorError, FileNotFoundError) as error:
        raise OSError(f"the engine left no whole file of hidden states ({error})") from error
    finally:
        for leftover in (file, lock):
            leftover.unlink(missing_ok=True)
    if found["token_ids"].tolist() != text:
        raise ValueError("the engine's hidden states are of other tokens than it was asked")
    return split_layers(found["hidden_states"], len(text), manifest)


def split_layers(
    states: Float[Tensor, "m L T"], tokens: int, manifest: Manifest
) -> tuple[BFloat16[Tensor, "n AD"], BFloat16[Tensor, "n T"]]:
    """The captured layers side by side, and the last one; raises ``ValueError`` if they are wrong.

    States that are zero or the same at every token are what an engine hands out for text that it
    took from a cache, or copied before it was computed.
    """
    wanted = (tokens, len(manifest.layer_ids) + 1, manifest.hidden_size)
    if tuple(states.shape) != wanted:
        raise ValueError(
            f"the engine's hidden states have the shape {tuple(states.shape)} and not {wanted}: "
            "switch its prefix caching off, and give it these layers: "
            f"{[*manifest.layer_ids, manifest.num_layers]}"
        )
    zero = (states == 0).all(-1).any()
    constant = tokens > 1 and (states == states[:1]).all(-1).all(0).any()
    if not torch.isfinite(states).all() or zero or constant:
        raise ValueError(
            "the engine's hidden states are not finite, zero, or the same at every token: switch "
            "its prefix caching off, or capture with --capture.engine transformers"
        )
    kept = states.to(torch.bfloat16)
    return kept[:, :-1].flatten(1).contiguous(), kept[:, -1].contiguous()


def check_logits(head: TargetHead, final: Float[Tensor, "n T"], reply: Reply) -> None:
    """Raise ``ValueError`` unless the head rebuilds the engine's own log probabilities.

    They are compared where the answer's tokens were drawn, for the likeliest tokens of each. Then
    the engine serves this target, and a drafter learns from the distribution that it serves.

    Args:
        final: of prompt and answer less its last token.
    """
    count = len(reply.likely)
    ours = F.log_softmax(head(final[-count:]), -1)
    pairs = [
        (ours[place, token], value)
        for place, likely in enumerate(reply.likely)
        for token, value in likely.items()
        if token < ours.shape[-1]
    ]
    found, theirs = (torch.tensor(values) for values in zip(*pairs, strict=True))
    error = float((found - theirs).norm() / theirs.norm())
    if not error < 0.05:  # bf16 rounds by less than 0.02; a forgotten factor or cap is far more
        raise ValueError(
            "the engine's log probabilities cannot be rebuilt from its last hidden state "
            f"(relative error {error:.2g}): it serves another model than this target, or peagle "
            "does not support this family"
        )
