"""Some of the target's own layers, kept beside a store: a drafter's layers can start as copies."""

from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peagle.store.errors import StoreError
from peagle.store.index import IDENTITY
from peagle.store.sample import digest

LLAMA_LAYER = {
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
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
        try:
            with safe_open(path, "pt") as file:
                hashes = file.metadata() or {}
                found = hashes.pop(IDENTITY.decode(), None)
                if identity and found and found != identity:
                    raise StoreError(
                        path.parent, f"{path.name} belongs to a store of another target"
                    )
                for key, hash_ in hashes.items():
                    index, name = key.split(".", 1)
                    tensor = file.get_tensor(key)
                    if digest(tensor) != hash_:
                        raise StoreError(
                            path.parent, f"{path.name}: {key} is corrupt (its hash differs)"
                        )
                    layers.setdefault(int(index), {})[name] = tensor
        except (SafetensorError, OSError) as error:
            raise StoreError(path.parent, f"{path.name} cannot be read ({error})") from error
        return cls(dict(sorted(layers.items())))

    def save(self, path: Path, identity: str | None = None) -> None:
        """With the ``identity`` of its store's manifest it cannot be mistaken for another's."""
        tensors = {
            f"{index}.{name}": tensor.contiguous()
            for index, layer in self.layers.items()
            for name, tensor in layer.items()
        }
        metadata = {key: digest(t) for key, t in tensors.items()}
        if identity is not None:
            metadata[IDENTITY.decode()] = identity
        save_file(tensors, path, metadata=metadata or None)  # an empty dict makes a broken file

    def choose(self, count: int) -> list[int]:
        """``count`` layers or as many as there are: the first one and the last ones."""
        kept = list(self.layers)
        if count >= len(kept):
            return kept
        return [kept[0], *kept[len(kept) - count + 1 :]][:count]


def default_start_layers(num_layers: int) -> tuple[int, ...]:
    """The first, which reads embeddings, and the last three, which prepare the head's input."""
    return tuple(sorted({0, *range(max(0, num_layers - 3), num_layers)}))


def is_llama_layer(layer: nn.Module, activation: str | None) -> bool:
    """Whether a drafter's layer computes what this one does, given the same weights.

    Norms on queries and keys, biases, experts, further norms or another activation: then not.
    """
    return set(layer.state_dict()) == LLAMA_LAYER and activation in ("silu", "swish")
