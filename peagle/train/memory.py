"""How many rows a segment may have within a memory budget: a count of what a step keeps alive.

It counts weights and their copies in bf16, gradients and optimizer states, the batch, NTP, one
segment and a chunk of the loss; not the interpreter and its libraries (about half a gigabyte).
Three moments can be the highest: a segment's backward pass, that of NTP, the optimizer's step.
"""

import math

from peagle.kernels.reference import Reference
from peagle.model.config import PEagleConfig

SEGMENT = 4 * 4  # bytes per parameter: weight, two moments, the summed gradient
NTP = 5 * 4  # and the gradient that is handed on
STEP = 6 * 4  # and what the optimizer computes with
CHUNKS = 6  # copies of [chunk, vocabulary] in float32 that the loss works on
SLACK = 1.1  # allocators round up and keep what they may need again


def rows_within(
    memory_gb: float,
    config: PEagleConfig,
    *,
    slots: int,
    rollout: int,
    mtp_share: float,
    element: int,
    recompute: bool,
) -> int:
    """The most rows per segment that ``memory_gb`` (10**9 bytes) allows.

    Args:
        slots: longest packed sequence.
        rollout: rows of the longest rollout; a segment is at least one.
        mtp_share: share of the rows that are of depth 1 or more, and pass through the layers again.
        element: bytes of an activation, 2 under bf16 and else 4.
        recompute: NTP runs again in the backward pass instead of keeping its activations.

    Raises:
        ValueError: naming the smallest budget that holds a segment of one rollout.
    """
    weights = parameters(config)
    ntp = slots * slot_bytes(config, element, recompute=recompute)
    ntp += target_head_bytes(config)
    fixed = SEGMENT * weights + copied_bytes(config, element) + ntp
    fixed += CHUNKS * 4 * Reference.head_chunk * config.draft_vocab_size
    layers = mtp_share * config.num_hidden_layers
    row = row_bytes(config, element, layers) + score_bytes(config, slots)
    again = slots * layer_bytes(config, element) if recompute else 0
    others = max(NTP * weights + ntp + again, STEP * weights)
    least = max(others, fixed + rollout * row) * SLACK
    if memory_gb * 1e9 < least:
        raise ValueError(
            f"memory_gb {memory_gb:g} cannot hold one segment of {slots} slots: "
            f"give at least {math.ceil(least / 1e7) / 100:g}, or lower max_tokens"
        )
    return int((memory_gb * 1e9 / SLACK - fixed) / row)


def copied_bytes(config: PEagleConfig, element: int) -> int:
    """Weights in bf16: one copy for all segments, one of ``fc`` and the attention for NTP, whose
    backward pass comes last."""
    shared = parameters(config) - config.vocab_size * config.hidden_size
    feed_forward = 3 * config.num_hidden_layers * config.hidden_size * config.intermediate_size
    kept_by_ntp = shared - feed_forward - config.draft_vocab_size * config.hidden_size
    return 2 * (shared + kept_by_ntp) if element == 2 else 0


def target_head_bytes(config: PEagleConfig) -> int:
    """As captures store it, in bf16."""
    return 2 * config.draft_vocab_size * config.target_hidden_size


def slot_bytes(config: PEagleConfig, element: int, *, recompute: bool) -> int:
    """Bytes that one NTP slot keeps while segments run, its share of the batch included."""
    layers, width = config.num_hidden_layers, config.hidden_size
    captured = 2 * (config.num_aux + 1) * config.target_hidden_size
    gradients = 2 * 4 * layers * config.num_key_value_heads * config.head_dim
    inputs = layers * element * width if recompute else 0
    return captured + gradients + inputs + row_bytes(config, element, 0 if recompute else layers)


def row_bytes(config: PEagleConfig, element: int, layers: int | float) -> int | float:
    """Activations that one row keeps for its backward pass, which needs some more itself."""
    backward = 2 * element * config.intermediate_size
    ends = 5 * element * config.hidden_size
    return layers * layer_bytes(config, element) + backward + ends


def layer_bytes(config: PEagleConfig, element: int) -> int:
    """What one row keeps in one layer."""
    query = config.num_attention_heads * config.head_dim
    pair = config.num_key_value_heads * config.head_dim
    attention = (element + 4) * (query + pair)  # queries and keys may be float32
    return element * (4 * config.hidden_size + 2 * config.intermediate_size) + attention


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
