"""How many rows a segment may have within a memory budget: a count of what a step keeps alive.

What is counted are weights, gradients and optimizer states, the batch, the depth-0 stream, one
segment and a chunk of the loss; not the interpreter and its libraries (about half a gigabyte).
"""

import math

from peagle.loss import CHUNK_ROWS
from peagle.model.config import PEagleConfig

STATES = 6 * 4  # bytes per parameter: weight, two moments, gradient, and the one being held
CHUNKS = 6  # copies of [chunk, vocabulary] in float32 that the loss works on
SLACK = 1.1  # allocators round up and keep what they may need again


def rows_within(
    memory_gb: float,
    config: PEagleConfig,
    *,
    slots: int,
    rollout: int,
    element: int,
    recompute: bool,
) -> int:
    """The most rows per segment that ``memory_gb`` (10**9 bytes) allows.

    Args:
        slots: longest packed sequence.
        rollout: rows of the longest rollout; a segment is at least one.
        element: bytes of an activation, 2 under bf16 and else 4.
        recompute: depth 0 runs again in the backward pass instead of keeping its activations.

    Raises:
        ValueError: naming the smallest budget that holds a segment of one rollout.
    """
    fixed = fixed_bytes(config, slots=slots, element=element, recompute=recompute)
    row = row_bytes(config, element, config.num_hidden_layers) + score_bytes(config, slots)
    rows = int((memory_gb * 1e9 / SLACK - fixed) / row)
    if rows < rollout:
        least = math.ceil((fixed + rollout * row) * SLACK / 1e7) / 100
        raise ValueError(
            f"memory_gb {memory_gb:g} cannot hold one segment of {slots} slots: "
            f"give at least {least:g}, or lower max_tokens"
        )
    return rows


def fixed_bytes(config: PEagleConfig, *, slots: int, element: int, recompute: bool) -> int:
    """What is there whatever the size of a segment."""
    width, vocabulary = config.hidden_size, config.draft_vocab_size
    target_head = 2 * vocabulary * config.target_hidden_size
    head_gradients = 2 * 4 * vocabulary * width  # the loss's and the segment's
    chunk = CHUNKS * 4 * CHUNK_ROWS * vocabulary
    captured = 2 * (config.num_aux + 1) * config.target_hidden_size  # per slot, bf16
    pairs = 2 * 2 * 4 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    kept = 1 if recompute else config.num_hidden_layers
    inputs = config.num_hidden_layers * element * width if recompute else 0
    stream = row_bytes(config, element, kept) + inputs + pairs + 2 * element * width
    states = STATES * parameters(config) + head_gradients + target_head
    return states + chunk + slots * (captured + stream)


def row_bytes(config: PEagleConfig, element: int, layers: int) -> int:
    """Activations of ``layers`` that one row keeps for its backward pass, which needs some too."""
    width, wide = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    pair = config.num_key_value_heads * config.head_dim
    attention = element * (query + pair) + 4 * (query + pair)  # queries and keys may be float32
    layer = 4 * element * width + attention + 4 * element * wide
    backward = 3 * element * wide + 4 * 2 * (query + 2 * pair)
    ends = 5 * element * width
    return layers * layer + backward + ends


def score_bytes(config: PEagleConfig, slots: int) -> int:
    """Attention weights that a row of an EAGLE-3 rollout keeps (``eagle3.py``), at most."""
    heads = 0 if config.parallel_drafting else config.num_attention_heads
    return config.num_hidden_layers * heads * slots * 4


def parameters(config: PEagleConfig) -> int:
    """Weights of the drafter."""
    width, wide, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    query = config.num_attention_heads * config.head_dim
    pair = config.num_key_value_heads * config.head_dim
    layer = width * (query + 2 * pair) + query * width + 3 * width * wide
    tables = width * (config.vocab_size + config.draft_vocab_size)
    combine = config.num_aux * config.target_hidden_size * width
    return layers * layer + width * (query + 2 * pair) + tables + combine
