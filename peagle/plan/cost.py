"""What training a drafter costs: memory by part, arithmetic, and how fast this machine is at it."""

import time
from typing import NamedTuple

import torch

from peagle.kernels.device import has_own_memory, synchronize
from peagle.kernels.reference import Reference
from peagle.model.build import build_drafter
from peagle.model.config import PEagleConfig
from peagle.train.memory import (
    CHUNKS,
    SLACK,
    copied_bytes,
    row_bytes,
    score_bytes,
    slot_bytes,
    target_head_bytes,
)


class Shape(NamedTuple):
    """One packed sequence and how it is cut."""

    slots: int
    rows: int  # expected, of all depths
    segment_rows: int  # of the largest segment


class Cost(NamedTuple):
    memory: dict[str, int]  # bytes by part, per device
    flops: float  # of one packed sequence, forward and backward
    parameters: int


def cost_of(
    config: PEagleConfig,
    shape: Shape,
    *,
    half: bool,
    muon: bool,
    train_embeddings: bool,
    recompute: bool = False,
) -> Cost:
    """Memory and arithmetic of training on one packed sequence.

    Weights, gradients (twice: their sum, and what is handed on) and the optimizer's state are
    float32; activations and the copies of weights that products read are bf16 when ``half``.
    ``muon`` keeps one moment of matrices where AdamW keeps two.
    """
    with torch.device("meta"):
        drafter = build_drafter(config)
    total = sum(p.numel() for p in drafter.parameters())
    trained = total - (0 if train_embeddings else drafter.embed_tokens.weight.numel())
    matrices = sum(
        p.numel()
        for name, p in drafter.named_parameters()
        if p.ndim == 2 and name.startswith(("layers.", "fc."))
    )
    head, element = drafter.lm_head.weight.numel(), 2 if half else 4
    layers = config.num_hidden_layers
    row = row_bytes(config, element, layers) + score_bytes(config, shape.slots)
    memory = {
        "weights": 4 * total,
        "bf16 copies": copied_bytes(config, element),
        "gradients": 4 * 2 * trained,
        "optimizer": (4 if muon else 8) * matrices + 8 * (trained - matrices),
        "target head": target_head_bytes(config),
        "sequence": shape.slots * slot_bytes(config, element, recompute=recompute),
        "segment": shape.segment_rows * row,
        "logits": CHUNKS * 4 * Reference.head_chunk * config.draft_vocab_size,
    }
    memory["slack"] = round((SLACK - 1) * sum(memory.values()))
    return Cost(memory, flops_of(config, shape, matrices, head), total)


def flops_of(config: PEagleConfig, shape: Shape, matrices: int, head: int) -> float:
    """Three times the forward pass, and the target's logits once per position."""
    linear = 2 * matrices * shape.rows + 2 * head * shape.rows
    heads = config.num_attention_heads * config.head_dim
    attention = 4 * heads * shape.rows * shape.slots / 2 * config.num_hidden_layers
    target = 2 * config.draft_vocab_size * config.target_hidden_size * shape.slots
    return 3.0 * (linear + attention) + target


def matrix_rate(device: str, *, half: bool, seconds: float = 2.0) -> float:
    """Floating point operations per second of large matrix products on this machine."""
    size = 4096 if has_own_memory(device) else 1024
    dtype = torch.bfloat16 if half else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype)

    def multiply() -> None:
        torch.mm(a, b)
        synchronize(device)

    multiply()  # the first product loads libraries
    begin, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        multiply()
        count += 1
    return 2 * size**3 * count / (time.perf_counter() - begin)
