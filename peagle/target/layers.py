"""Some of the target's own layers, kept beside a store: a drafter's layers can start as copies."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from peagle.target.hidden_states import decoder_layers
from peagle.target.weights import compact, read_weights, rms_norm_weight, write_weights

NORMS = ("input_layernorm", "post_attention_layernorm")
LLAMA_LAYER = {
    *(f"{name}.weight" for name in NORMS),
    *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
}


class TargetLayers(NamedTuple):
    """State dicts of layers, by their index in the target; empty if it has no Llama layers."""

    layers: dict[int, dict[str, Tensor]]

    @classmethod
    def load(cls, path: Path, identity: str | None = None) -> "TargetLayers":
        """Raises ``ValueError`` if the file is missing, damaged or another store's."""
        layers: dict[int, dict[str, Tensor]] = {}
        for key, tensor in read_weights(path, identity).items():
            index, name = key.split(".", 1)
            layers.setdefault(int(index), {})[name] = tensor
        return cls(dict(sorted(layers.items())))

    def save(self, path: Path, identity: str | None = None) -> None:
        tensors = {
            f"{index}.{name}": tensor
            for index, layer in self.layers.items()
            for name, tensor in layer.items()
        }
        write_weights(path, tensors, identity)

    def choose(self, count: int) -> list[int]:
        """``count`` layers or as many as there are: the first one and the last ones."""
        kept = list(self.layers)
        if count >= len(kept):
            return kept
        return [kept[0], *kept[len(kept) - count + 1 :]][:count]


def target_layers_of(
    model: PreTrainedModel, config: PretrainedConfig, indices: tuple[int, ...]
) -> TargetLayers:
    """Copies of the given layers; none unless they are plain Llama layers."""
    layers = {index: decoder_layers(model)[index] for index in indices}
    activation = getattr(config, "hidden_act", None)
    if not all(is_llama_layer(layer, activation) for layer in layers.values()):
        return TargetLayers({})
    copies = {}
    for index, layer in layers.items():
        copies[index] = {name: compact(tensor) for name, tensor in layer.state_dict().items()}
        for name in NORMS:
            norm = layer.get_submodule(name)
            norm = rms_norm_weight(norm, config.hidden_size, norm.weight.device)
            copies[index][f"{name}.weight"] = compact(norm)
    return TargetLayers(copies)


def default_start_layers(num_layers: int) -> tuple[int, ...]:
    """The first, which reads embeddings, and the last three, which prepare the head's input."""
    return tuple(sorted({0, *range(max(0, num_layers - 3), num_layers)}))


def is_llama_layer(layer: nn.Module, activation: str | None) -> bool:
    """Whether a drafter's layer computes what this one does, given the same weights.

    Norms on queries and keys, biases, experts, further norms or another activation: then not.
    """
    return set(layer.state_dict()) == LLAMA_LAYER and activation in ("silu", "swish")
