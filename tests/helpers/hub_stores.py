"""Stores on the loopback Hub, and what a run's cache holds of them."""

import re
from pathlib import Path

from hub_server import Hub

from peagle.store.hub import HubStore, find_store, open_store, store_address

NAME = "alice/states"
ADDRESS = f"hf://datasets/{NAME}/tiny@main"


def put_store(hub: Hub, folder: Path, sub: str = "tiny") -> str:
    """The whole store in a folder of a data set; returns the commit."""
    capture = folder / "capture.json"
    if not capture.exists():
        capture.write_text('{"prompts": []}')
    prefix = f"{sub}/" if sub else ""
    files = {f"{prefix}{p.name}": p.read_bytes() for p in folder.iterdir() if p.is_file()}
    return hub.put(f"datasets/{NAME}", files | {"README.md": b"# States"})


def opened(address: str = ADDRESS, *, cache_gb: float = 1.0, skip: bool = False) -> HubStore:
    found = find_store(store_address(address))
    return open_store(found, cache_gb=cache_gb, allow_missing=skip)


def fetched(hub: Hub, name: str = r"shard-\d+\.safetensors") -> list[str]:
    """The files that were asked for, in the order of their arrival, heads left out."""
    asked = [address for route, address in hub.requests if route == "resolve"]
    found = [re.fullmatch(rf"GET .*/({name})", address) for address in asked]
    return [match[1] for match in found if match]


def shards_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in sorted(folder.glob("shard-*.safetensors"))}
