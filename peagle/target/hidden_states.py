"""Hooks that read the target's hidden states while it runs.

Layer id ``k`` is what enters layer ``k`` (vLLM's convention): 0 is the embedding, and ``N``, the
number of layers, is the last layer's output before the final norm.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel


class HiddenStates:
    """Hidden states of the last forward pass within ``hidden_states``."""

    def __init__(self, num_layers: int) -> None:
        self.num_layers = num_layers
        self.entering: dict[int, Tensor] = {}  # by layer id

    def aux(self, layer_ids: tuple[int, ...]) -> Float[Tensor, "B n AD"]:
        """The given layers side by side."""
        return torch.cat([self.entering[k] for k in layer_ids], -1)

    @property
    def final(self) -> Float[Tensor, "B n T"]:
        return self.entering[self.num_layers]


@contextmanager
def hidden_states(model: PreTrainedModel, layer_ids: tuple[int, ...]) -> Iterator[HiddenStates]:
    """Record what enters the given layers, and always ``final``; nothing else is kept."""
    layers = decoder_layers(model)
    states = HiddenStates(len(layers))

    def record_input(k: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            states.entering[k] = args[0] if args else kwargs["hidden_states"]

        return hook

    def record_final(module: nn.Module, args: tuple, output) -> None:
        states.entering[len(layers)] = output[0] if isinstance(output, tuple) else output

    handles = [
        layers[k].register_forward_pre_hook(record_input(k), with_kwargs=True)
        for k in layer_ids
        if k < len(layers)
    ]
    handles.append(layers[-1].register_forward_hook(record_final))
    try:
        yield states
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_decoder().layers
