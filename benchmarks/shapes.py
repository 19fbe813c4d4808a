"""What is measured: a drafter's shape, a sequence, and the work that a training step must do."""

from dataclasses import dataclass
from typing import Any

SHAPES = {
    "small": {},
    "qwen3-8b": {
        "hidden": 4096,
        "intermediate": 12288,
        "heads": 32,
        "groups": 8,
        "head_dim": 128,
        "vocab": 151936,
        "draft_vocab": 32000,
    },
}
DTYPES = {"fp32": "fp32", "bf16": "bf16", "float32": "fp32", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Shape:
    """One training step: a document of ``n`` slots, all supervised. Defaults are ``small``."""

    n: int
    depths: int = 8
    dtype: str = "fp32"  # bf16: float32 weights under autocast
    keep_ratio: float = 0.7
    min_keep_ratio: float = 0.2
    hidden: int = 512
    intermediate: int = 1408
    heads: int = 8
    groups: int = 4  # key/value heads
    head_dim: int = 64
    layers: int = 4
    captured: int = 3  # layers of the target
    vocab: int = 8192
    draft_vocab: int = 8192

    def block(self) -> dict[str, Any]:
        """The layers, in the names of transformers' configurations."""
        return {
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.groups,
            "head_dim": self.head_dim,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocab,
            "max_position_embeddings": max(self.n, 2048),
        }

    @property
    def mtp_rows(self) -> float:
        """Rows of depth >= 1."""
        shares = [max(self.keep_ratio**d, self.min_keep_ratio) for d in range(1, self.depths)]
        return sum((self.n - d) * share for d, share in enumerate(shares, 1))

    def operations(self) -> dict[str, float]:
        """Floating-point operations that one step cannot do without, forward and backward."""
        queries, pairs = self.heads * self.head_dim, self.groups * self.head_dim
        first = 2 * self.hidden * (queries + 2 * pairs)  # layer 0 is wide
        output = self.hidden * queries
        later = self.hidden * (queries + 2 * pairs)
        feed_forward = 3 * self.hidden * self.intermediate
        layers = first + (self.layers - 1) * later + self.layers * (output + feed_forward)
        combine = self.captured * self.hidden**2
        head = self.hidden * self.draft_vocab
        n, mtp = self.n, self.mtp_rows
        return {
            "depth 0": 6 * n * (layers + combine),
            "rollouts": 6 * mtp * (layers - first),  # their layer 0 reads one vector
            "draft head": 6 * (n + mtp) * head,
            "target head": 2 * n * head,  # once per position
            "attention": self.layers * 14 * queries * (n * n / 2 + mtp * n / 2),
        }
