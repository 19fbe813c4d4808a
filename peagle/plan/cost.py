"""What training a drafter costs: memory by part, arithmetic, and how fast this machine is at it."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from peagle.loss import CHUNK_ROWS
from peagle.model.config import PEagleConfig
from peagle.model.drafter import PEagleDrafter


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
    config: PEagleConfig, shape: Shape, *, half: bool, muon: bool, train_embeddings: bool
) -> Cost:
    """Memory and arithmetic of training on one packed sequence.

    Weights, their gradients and the optimizer's state are float32, activations bf16 when
    ``half``. ``muon`` keeps one moment for matrices where AdamW keeps two.
    """
    with torch.device("meta"):
        drafter = PEagleDrafter(config)
    embedding = drafter.embed_tokens.weight.numel()
    total = sum(p.numel() for p in drafter.parameters())
    trained = total - (0 if train_embeddings else embedding)
    matrices = sum(
        p.numel()
        for name, p in drafter.named_parameters()
        if p.ndim == 2 and name.startswith(("layers.", "fc."))
    )
    head = drafter.lm_head.weight.numel()
    shared = sum(p.numel() for p in drafter.shared_parameters())
    width = 2 if half else 4
    deep = max(shape.segment_rows - round(shape.slots * shape.segment_rows / shape.rows), 0)
    per_row = sum(row_values(config, i) for i in range(config.num_hidden_layers)) * width
    memory = {
        "weights": 4 * total + (2 * matrices + 2 * head if half else 0),
        "gradients": 4 * (trained + shared),
        "optimizer": (4 * matrices if muon else 8 * matrices) + 8 * (trained - matrices),
        "target head": 2 * 2 * config.vocab_size * config.target_hidden_size,
        "sequence": shape.slots * (per_row + 2 * config.target_hidden_size * (config.num_aux + 1)),
        "segment": deep * per_row,
        "logits": 4 * CHUNK_ROWS * config.draft_vocab_size * 4,
    }
    return Cost(memory, flops_of(config, shape, matrices, head), total)


def row_values(config: PEagleConfig, layer: int) -> int:
    """Numbers that one row of one layer leaves for the backward pass."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    entering = 2 * width if layer == 0 else width
    return entering + 5 * width + 3 * heads + 4 * groups + 4 * inner


def flops_of(config: PEagleConfig, shape: Shape, matrices: int, head: int) -> float:
    """Three times the forward pass, and the target's logits once per position."""
    linear = 2 * matrices * shape.rows + 2 * head * shape.rows
    heads = config.num_attention_heads * config.head_dim
    attention = 4 * heads * shape.rows * shape.slots / 2 * config.num_hidden_layers
    target = 2 * config.draft_vocab_size * config.target_hidden_size * shape.slots
    return 3.0 * (linear + attention) + target


def matrix_rate(device: str, *, half: bool, seconds: float = 2.0) -> float:
    """Floating point operations per second of large matrix products on this machine."""
    size = 4096 if device != "cpu" else 1024
    dtype = torch.bfloat16 if half else torch.float32
    a, b = torch.randn(2, size, size, device=device).to(dtype)

    def run() -> None:
        torch.mm(a, b)
        if device != "cpu":
            torch.cuda.synchronize()

    run()
    return 2 * size**3 / seconds_per_run(run, seconds)


def seconds_per_run(run: Callable[[], None], seconds: float) -> float:
    """Mean over as many runs as fit into the time."""
    begin, count = time.perf_counter(), 0
    while count == 0 or time.perf_counter() - begin < seconds:
        run()
        count += 1
    return (time.perf_counter() - begin) / count
