"""Weights taken out of a target: their effective values, and the files that hold them."""

from collections.abc import Iterable
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from peagle.store.disk import rename_durably
from peagle.store.errors import StoreError
from peagle.store.index import IDENTITY
from peagle.store.sample import digest


@torch.no_grad()
def rms_norm_weight(norm: nn.Module, width: int, device: torch.device) -> Float[Tensor, " T"]:
    """What an RMS norm multiplies by, as float32; the input is large so that eps plays no part."""
    return norm(torch.full((1, width), 2.0**12, device=device))[0].float()


def compact(tensor: Tensor) -> Tensor:
    """As bf16 when that loses nothing (weights that were bf16 on disk), on the CPU, unshared."""
    half = tensor.to(torch.bfloat16)
    kept = half if torch.equal(half.to(tensor.dtype), tensor) else tensor
    return kept.detach().cpu().clone()


def write_weights(path: Path, tensors: dict[str, Tensor], identity: str | None = None) -> None:
    """Write the tensors and their hashes; a kill leaves no torn file.

    The ``identity`` of the store's manifest keeps the file from being used with another store.
    """
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = {name: digest(tensor) for name, tensor in tensors.items()}
    if identity is not None:
        metadata[IDENTITY.decode()] = identity
    temporary = path.with_name(f"{path.name}.tmp")
    save_file(tensors, temporary, metadata=metadata or None)  # an empty dict makes a broken file
    rename_durably(temporary, path)


def read_weights(
    path: Path, identity: str | None = None, *, names: Iterable[str] | None = None
) -> dict[str, Tensor]:
    """The tensors of a file of ``write_weights``: all of them, or exactly ``names``.

    Raises:
        ValueError: if the file is missing, damaged, or of a store with another ``identity``.
    """
    try:
        with safe_open(path, "pt") as file:
            hashes = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in names or file.keys()}
    except (SafetensorError, OSError) as error:
        raise StoreError(path.parent, f"{path.name} cannot be read ({error})") from error
    owner = hashes.pop(IDENTITY.decode(), None)
    if identity and owner and owner != identity:
        raise StoreError(path.parent, f"{path.name} belongs to a store of another target")
    for name, hash_ in hashes.items():
        if name not in tensors or digest(tensors[name]) != hash_:
            raise StoreError(path.parent, f"{path.name}: {name} is corrupt (its hash differs)")
    return tensors
