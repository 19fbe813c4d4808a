"""How a store is made: the ``capture`` section of a run's YAML."""

import hashlib
import json
from dataclasses import asdict, dataclass

from peagle.data.prompts import PromptSource


@dataclass(frozen=True)
class CaptureConfig:
    """How a store is made.

    Args:
        prompts: prompt sets; only their prompts are used, the target writes the answers.
        layer_ids: hidden states to keep, in vLLM's numbering; default (2, N//2, N-3).
        start_layers: target layers that a drafter's layers can start from; default the first and
            the last two.
        max_new_tokens: length limit of an answer.
        max_tokens: conversations whose prompt leaves no room for an answer are left out, counted.
        greedy_share: share of the answers decoded greedily; the others are sampled.
        temperature: of the sampled answers.
        batch_size: conversations answered together.
        batch_tokens: tokens (with padding) in one pass that reads hidden states.
        dtype: precision the target runs in; the store itself is bf16.
        device: where the target runs; ``auto`` is a GPU if there is one.
        val_share: share of the conversations kept for validation, by hash.
        shard_mb: size of a shard.
        seed: of the sampled answers.
    """

    prompts: list[PromptSource]
    layer_ids: list[int] | None = None
    start_layers: list[int] | None = None
    max_new_tokens: int = 512
    max_tokens: int = 2048
    greedy_share: float = 0.5
    temperature: float = 1.0
    batch_size: int = 32
    batch_tokens: int = 16384
    dtype: str = "bfloat16"
    device: str = "auto"
    val_share: float = 0.05
    shard_mb: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("capture.prompts names no prompt set")
        if not 0 <= self.greedy_share <= 1:
            raise ValueError(f"greedy_share must lie in 0..1, got {self.greedy_share}")
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share must lie between 0 and 1, got {self.val_share}")

    def answers_hash(self) -> str:
        """Identity of the conversations: the prompts and how they are answered."""
        keys = ("prompts", "max_new_tokens", "max_tokens", "greedy_share", "temperature", "seed")
        made = {key: value for key, value in asdict(self).items() if key in keys}
        return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:16]
