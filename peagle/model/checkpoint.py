"""Reading checkpoints as data: tensors and plain values, from a file or the Hub, never code."""

import sys
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import hf_hub_download

from peagle.store.errors import reason
from peagle.store.hub_address import parse_address


def check_address(address: str) -> None:
    """Raise ``ValueError`` unless a checkpoint lies in a file that exists, or on the Hub."""
    if "://" in address or "::" in address:
        if not address.startswith("hf://") or "::" in address:
            raise ValueError(f"{address}: checkpoints are read from files and hf:// only")
        place = parse_address(address)
        if place is None or not place.path:
            raise ValueError(
                f"{address}: a checkpoint on the Hub is written hf://OWNER/NAME/FILE@REVISION"
            )
    elif Path(address).is_dir():
        example = Path(address) / "checkpoints" / "last.ckpt"
        raise ValueError(f"{address} is a folder: give a checkpoint, as {example}")
    elif not Path(address).is_file():
        raise ValueError(f"checkpoint {address} does not exist")


def read_checkpoint(address: str, *, map_location: Any = "cpu") -> Any:
    """The content of a checkpoint, which need not be a dictionary.

    Raises:
        ValueError: if it is missing or torn, or holds more than tensors and plain values.
    """
    check_address(address)
    path = fetch(address) if "://" in address else address
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # a forged or torn file can make the reader raise anything
        raise ValueError(
            f"checkpoint {address} is refused: it is torn, or holds more than tensors and plain "
            f"values ({reason(error)})"
        ) from error


def fetch(address: str) -> str:
    """Bring a checkpoint of the Hub into the client's cache and say which commit it is of.

    A revision may be a branch, and a branch moves on; the commit that is printed names the same
    bytes for ever.
    """
    place = parse_address(address)
    assert place is not None, "check_address comes first"
    options = {"repo_type": place.kind, "revision": place.revision}
    try:
        path = hf_hub_download(place.repo, place.path, **options)
    except Exception as error:  # the client raises whatever its transport raises
        raise ValueError(f"checkpoint {address} cannot be fetched: {reason(error)}") from error
    folders = len(PurePosixPath(place.path).parts)
    commit = Path(path).parents[folders - 1].name  # .../snapshots/COMMIT/FILE
    print(f"checkpoint {place._replace(revision=commit)}", file=sys.stderr)
    return path
