"""A drafter that somebody has published, read as data: from a folder or the Hub, in any layout.

Published heads name less than our own exports, and by other names: the first layer is ``midlayer``,
the mask token stands in ``ptd_token_id`` as text, a full vocabulary has a ``d2t`` that changes
nothing. Weights come from safetensors alone, and of ``config.json`` only what shapes a drafter.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import StrictDataclassError
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from peagle.model.config import PEagleConfig
from peagle.store.errors import reason
from peagle.store.hub_address import HubAddress, parse_address
from peagle.store.shard import Span
from peagle.target.target import read_header, weight_files

NEEDED = (  # else a library's default would be taken for what was published
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "vocab_size",
)
READ = (  # of config.json, as it stands there
    *NEEDED,
    *("num_key_value_heads", "head_dim", "target_hidden_size", "draft_vocab_size"),
    *("attention_bias", "mlp_bias", "hidden_act", "rms_norm_eps", "max_position_embeddings"),
    *("rope_parameters", "rope_theta", "rope_scaling", "num_depths"),
    *("norm_before_residual", "norm_before_fc", "fc_norm"),
)
MASK_NAMES = ("mask_token_id", "pard_token", "ptd_token_id")  # in vLLM's order
LAYER_IDS = "eagle_aux_hidden_state_layer_ids"
MOST_LAYERS = 1000  # no target has more, and a forged number must not fill memory
FIRST_LAYER = "midlayer."  # what vLLM also calls ``layers.0.``


class Place(NamedTuple):
    """Where a tensor lies: the file, its name there, and its shape and type."""

    path: Path
    name: str
    span: Span


@dataclass(frozen=True)
class PublishedDrafter:
    """What ``config.json`` says, and the tensors, under the names of ``Drafter``."""

    name: str  # the folder, or the address at a commit
    folder: Path
    config: PEagleConfig
    given: frozenset[str]  # settings that config.json has: the others are defaults
    address: HubAddress | None = None

    @cached_property
    def files(self) -> list[Path]:
        """The safetensors files, fetched when first asked for. Raises ``ValueError``."""
        if self.address is not None:
            fetch_weights(self.address)
        files = weight_files(self.folder)
        if not files:
            raise ValueError(f"{self.name} holds no safetensors file, and no other kind is read")
        return files

    @cached_property
    def places(self) -> dict[str, Place]:
        """Every tensor, from the headers alone. Raises ``ValueError`` for a torn file."""
        found = {}
        for path in self.files:
            for name, span in read_header(path).items():
                first = name.startswith(FIRST_LAYER)
                ours = "layers.0." + name.removeprefix(FIRST_LAYER) if first else name
                found[ours] = Place(path, name, span)
        return found

    def read(self, name: str) -> Tensor:
        """One tensor, as it lies in its file."""
        place = self.places[name]
        with safe_open(place.path, "pt") as file:
            return file.get_tensor(place.name)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, one at a time. Raises ``ValueError`` for one that is not finite."""
        for name in self.places:
            tensor = self.read(name)
            if not torch.isfinite(tensor).all():
                raise ValueError(f"{self.name}: tensor {name} is not finite")
            yield name, tensor

    def sha256(self) -> str:
        """Of the weights; several files are hashed as one."""
        found = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                hashlib.file_digest(file, lambda: found)
        return found.hexdigest()

    def token_ids(self) -> Int[Tensor, " W"]:
        """The target's token of each row of the head.

        Raises:
            ValueError: if ``d2t`` is missing where it is needed, or names no tokens.
        """
        size, vocab_size = self.config.draft_vocab_size, self.config.vocab_size
        rows = torch.arange(size)
        if "d2t" not in self.places and not self.config.pruned:
            return rows
        if "d2t" not in self.places:
            raise ValueError(f"{self.name} has no d2t, which says what its {size} tokens are")
        d2t = self.read("d2t").long()
        if not self.config.pruned and torch.equal(d2t, rows):  # ids in place of offsets
            return rows
        if d2t.shape != rows.shape or not valid_ids(rows + d2t, vocab_size):
            raise ValueError(
                f"{self.name}: d2t must hold {size} offsets to different tokens below {vocab_size}"
            )
        return rows + d2t


def valid_ids(ids: Int[Tensor, " W"], vocab_size: int) -> bool:
    inside = bool(((ids >= 0) & (ids < vocab_size)).all())
    return inside and len(ids.unique()) == len(ids)


def find_published(address: str) -> PublishedDrafter:
    """The drafter in a folder, or on the Hub at the commit that its revision names now.

    Only ``config.json`` is read, and fetched.

    Args:
        address: a folder, OWNER/NAME, OWNER/NAME@REVISION, or hf://OWNER/NAME/FOLDER@REVISION.

    Raises:
        ValueError: if there is no drafter.
    """
    folder, place = Path(address).expanduser(), None
    name = str(folder.resolve())
    if folder.is_file():
        raise ValueError(
            f"model.init_from: {address} is a file: give the folder of a drafter (`python -m "
            f"peagle export --ckpt_path CHECKPOINT --out FOLDER` makes one of a checkpoint)"
        )
    if not folder.is_dir():
        place, folder = find_on_hub(address)
        name = str(place)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(
            f"model.init_from: {address} has no config.json: give the folder of a drafter, as "
            "RUN/drafter"
        )
    try:
        config, given = read_settings(json.loads(path.read_text("utf-8")))
    except (ValueError, TypeError, AttributeError, StrictDataclassError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{path} is not the configuration of a drafter: {text}") from error
    return PublishedDrafter(name, folder, config, given, place)


def find_on_hub(address: str) -> tuple[HubAddress, Path]:
    """The commit that a drafter is read at, and the folder in the client's cache."""
    text = address if address.startswith("hf://") else f"hf://{address}"
    place = parse_address(text if "@" in text else f"{text}@main")
    if place is None or place.kind != "model":
        raise ValueError(
            f"model.init_from: there is no folder {address}: give the folder of a drafter, or "
            "OWNER/NAME or OWNER/NAME@REVISION of the Hub"
        )
    try:
        path = hf_hub_download(place.repo, place.inside("config.json"), revision=place.revision)
    except Exception as error:  # the client raises whatever its transport raises
        raise ValueError(
            f"model.init_from: there is no folder {address}, and no drafter of that name can be "
            f"read from the Hub ({reason(error)})"
        ) from error
    folder = Path(path).parent
    depth = len(Path(place.path).parts)
    commit = [folder, *folder.parents][depth].name  # .../snapshots/COMMIT/FOLDER
    return place._replace(revision=commit), folder


def fetch_weights(address: HubAddress) -> None:
    """Bring the safetensors files into the client's cache. Raises ``ValueError``."""
    try:
        snapshot_download(
            address.repo,
            revision=address.revision,
            allow_patterns=[address.inside("*.safetensors")],
        )
    except Exception as error:  # the client raises whatever its transport raises
        raise ValueError(f"{address} cannot be fetched: {reason(error)}") from error


def read_settings(written: dict[str, Any]) -> tuple[PEagleConfig, frozenset[str]]:
    """The configuration that ``config.json`` describes, and which settings it gives.

    Where it names no captured layers, those of the result stand for their number alone.

    Raises:
        ValueError: if a size is missing, or sizes do not fit each other.
    """
    settings = {**written, **written.get("transformer_layer_config", {})}
    settings = {name: value for name, value in settings.items() if value is not None}
    if missing := [name for name in NEEDED if name not in settings]:
        raise ValueError(f"it has no {missing[0]}")
    masks = [int(settings[name]) for name in MASK_NAMES if name in settings]
    ids = settings.get(LAYER_IDS) or settings.get("eagle_config", {}).get(LAYER_IDS)
    count = int(settings.get("num_aux_hidden_states", 3))  # vLLM's own default
    if not 0 < count < MOST_LAYERS:
        raise ValueError(f"num_aux_hidden_states must lie in 1..{MOST_LAYERS - 1}, got {count}")
    config = PEagleConfig(
        **{name: settings[name] for name in READ if name in settings},
        parallel_drafting=bool(settings.get("parallel_drafting", masks)),
        mask_token_id=masks[0] if masks else None,
        eagle_aux_hidden_state_layer_ids=sorted(set(ids)) if ids else list(range(count)),
    )
    given = {name for name in READ if name in settings} | ({LAYER_IDS} if ids else set())
    return config, frozenset(given)
