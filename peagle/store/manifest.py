"""Whose hidden states a store holds: ``store/manifest.json``."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import xxhash

from peagle.store.disk import write_atomically
from peagle.store.errors import StoreError

FORMAT = 1
ROUNDING = ("quantization", "kv_cache_dtype")


@dataclass(frozen=True)
class Manifest:
    """The identity of a store. Training on another target's states is an error, not a warning."""

    target: str
    revision: str | None
    fingerprint: str  # of the target's weights
    layer_ids: tuple[int, ...]
    hidden_size: int
    vocab_size: int
    num_layers: int
    dtype: str
    tokenizer: str  # hash of vocabulary and chat template
    rms_norm_eps: float
    softcap: float | None
    block: dict[str, Any]  # shape of the target's layers; a drafter starts from it
    answers: str  # hash of prompts and how their answers were made
    format: int = FORMAT
    engine: dict[str, Any] | None = None  # what began to run the target; older ones do not say

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Raises ``ValueError`` when there is no complete store in the folder."""
        path = folder / "manifest.json"
        if not path.exists():
            raise ValueError(
                f"no store at {folder}: run `python -m peagle capture` first, or give the --store "
                "that it was moved to"
            )
        try:
            found = json.loads(path.read_text())
        except ValueError as error:  # neither JSON nor, perhaps, text
            raise StoreError(folder, f"{path.name} is damaged ({error})") from error
        known = {field.name for field in fields(cls)}
        if isinstance(found, dict):
            found = {"engine": None, **found}
        if not isinstance(found, dict) or set(found) != known or found["format"] != FORMAT:
            raise StoreError(folder, f"{path.name} is not a manifest of format {FORMAT}")
        return cls(**{**found, "layer_ids": tuple(found["layer_ids"])})

    def identity(self) -> str:
        """Hash of all that makes the hidden states what they are.

        ``target`` is only a name, and engines differ by rounding; how they round is checked apart.
        """
        content = {k: v for k, v in asdict(self).items() if k not in ("target", "engine")}
        return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())

    def write(self, folder: Path) -> None:
        write_atomically(folder / "manifest.json", json.dumps(asdict(self), indent=2).encode())

    def check(self, wanted: "Manifest") -> None:
        """Raise ``ValueError`` naming the first field in which the store differs from the run.

        ``target`` is only a name: the same weights in another folder are the same target. Of the
        engine, what it was is no matter, but how it rounds weights and cache.
        """
        for field in fields(self):
            ours, theirs = getattr(self, field.name), getattr(wanted, field.name)
            if field.name == "fingerprint" and "-" not in ours:
                theirs = theirs.partition("-")[0]  # all that older stores know
            if field.name == "engine":
                ours, theirs = rounding(ours, theirs), rounding(theirs, ours)
            if ours != theirs and field.name != "target":
                raise ValueError(
                    f"the store was captured with {field.name} = {ours!r}, but this run needs "
                    f"{theirs!r}: use another store folder, or remove this one to capture again"
                )


def rounding(engine: dict[str, Any] | None, other: dict[str, Any] | None) -> dict[str, Any]:
    """How an engine rounds weights and cache, as far as both are known."""
    known = [] if engine is None or other is None else ROUNDING
    return {key: engine[key] for key in known}
