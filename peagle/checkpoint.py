"""Reading checkpoints as data: tensors and plain values, from a file or the Hub, never code."""

from pathlib import Path
from typing import Any

import fsspec
import torch


def check_address(address: str) -> None:
    """Raise ``ValueError`` unless a checkpoint lies in a file that exists, or on the Hub."""
    if "://" in address or "::" in address:
        if not address.startswith("hf://") or "::" in address:
            raise ValueError(f"{address}: checkpoints are read from files and hf:// only")
    elif not Path(address).is_file():
        raise ValueError(f"checkpoint {address} does not exist")


def read_checkpoint(address: str, *, map_location: Any = "cpu") -> Any:
    """The content of a checkpoint, which need not be a dictionary.

    Raises:
        ValueError: if it is missing or torn, or holds more than tensors and plain values.
    """
    check_address(address)
    try:
        if "://" not in address:
            return torch.load(address, map_location=map_location, weights_only=True)
        with fsspec.open(address, "rb") as file:
            return torch.load(file, map_location=map_location, weights_only=True)
    except Exception as error:  # a forged or torn file can make the reader raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(
            f"checkpoint {address} is refused: it is torn, or holds more than tensors and plain "
            f"values ({reason})"
        ) from error
