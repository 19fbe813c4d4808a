"""Which past each layer of a target sees: all of it, or a sliding window.

Reference decoding keeps keys and values by position (``kv_cache.py``) and masks them itself.
transformers takes one such mask for the whole model, so layers with a window are given theirs
right where they are called; that works the same for every family.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from peagle.decode.kv_cache import SlotCache
from peagle.target.hidden_states import decoder_layers

MASKED = ("eager", "sdpa")  # attention implementations that heed a mask per query and key


class LayerMasks:
    """The masks of the coming forward pass, one per window."""

    def __init__(self, sliding_windows: list[int | None]):
        self.sliding_windows = sliding_windows
        self.masks: dict[int | None, Tensor] = {}

    def place(self, cache: SlotCache, dtype: torch.dtype) -> Float[Tensor, "B 1 q limit"]:
        """Make them for the slots that the cache was placed at; returns the one without window."""
        for window in {None, *self.sliding_windows}:
            visible = cache.slots.visible(window)
            zero = torch.zeros(1, device=visible.device, dtype=dtype)
            self.masks[window] = zero.masked_fill(~visible, torch.finfo(dtype).min)[:, None]
        return self.masks[None]


def sliding_window_of_layers(model: PreTrainedModel) -> list[int | None]:
    """The sliding window of each layer; ``None`` where a layer sees everything before it.

    Raises:
        ValueError: if some layer does anything else, or the model keeps a state of its own:
            decoding it here would be wrong without a sign.
    """
    config = model.config.get_text_config()
    count = config.num_hidden_layers
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        layer_types = ["full_attention" if window is None else "sliding_attention"] * count
    problem = unsupported(model, config, layer_types)
    if problem:
        raise ValueError(
            f"the reference decoder cannot run a target of type {config.model_type} exactly "
            f"({problem}): measure its drafter in vLLM with `python -m peagle bench`"
        )
    return [window if name == "sliding_attention" else None for name in layer_types]


def unsupported(
    model: PreTrainedModel, config: PretrainedConfig, layer_types: list[str]
) -> str | None:
    """What the reference decoder could not do right, in words; None if there is nothing."""
    others = sorted(set(layer_types) - {"full_attention", "sliding_attention"})
    if others:
        return f"it has layers of {' and '.join(others)}"
    if getattr(model, "_is_stateful", False) or len(decoder_layers(model)) != len(layer_types):
        return "it keeps more than keys and values per layer"
    if getattr(config, "use_bidirectional_attention", None) in (True, "all"):
        return "its attention is not causal"
    if getattr(config, "kv_lora_rank", None):
        return "its cache holds latents (MLA) in place of keys and values"
    if config._attn_implementation not in MASKED:
        return f"attention {config._attn_implementation} takes no mask of ours"
    return None


@contextmanager
def mask_layers(model: PreTrainedModel, masks: LayerMasks) -> Iterator[None]:
    """Give every layer that has a window the mask for it."""

    def use_mask(window: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
            assert "attention_mask" in kwargs, "the layer's mask is not passed by name"
            return args, {**kwargs, "attention_mask": masks.masks[window]}

        return hook

    handles = [
        layer.register_forward_pre_hook(use_mask(window), with_kwargs=True)
        for layer, window in zip(decoder_layers(model), masks.sliding_windows, strict=True)
        if window is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
