"""Writing the servable folder: ``config.json`` and ``model.safetensors`` exactly as vLLM reads
them, checked, read back and only then put in its place."""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save, save_file

from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter
from peagle.serve.contract import (
    Layout,
    check_folder,
    check_tensors,
    plain_config,
    refuse_unservable,
    servable_tensors,
)
from peagle.store.disk import existing, sync

EXPORTED = {"config.json", "model.safetensors"}
METADATA = {"format": "pt"}  # of model.safetensors
ARCHITECTURES = {"LlamaForCausalLMEagle3", "PEagleSpeculator", "Eagle3Speculator"}  # in config.json


class Verifier(NamedTuple):
    """The target as the speculators layout names it; ``vllm serve DIR`` loads it by this name."""

    name: str
    architectures: list[str]


def export_drafter(
    drafter: Drafter,
    folder: Path,
    *,
    layout: Layout = "eagle3",
    verifier: Verifier | None = None,
    k: int | None = None,
) -> None:
    """Write the drafter in bf16; only an earlier export is replaced, by a verified new one.

    Args:
        layout: ``eagle3`` is vLLM's plain format (``--speculative-config`` names the folder);
            ``speculators`` lets ``vllm serve DIR`` find target and settings by itself.
        verifier: the target, needed by the speculators layout.
        k: drafts per round that the speculators layout asks for; default the trained depth.

    Raises:
        ValueError: naming the tensor that is missing, unexpected, misshapen or not finite, or the
            setting that no engine serves, or what the folder holds that is no export.
    """
    refuse_foreign(folder)
    refuse_unservable(drafter.config)
    tensors = servable_tensors(drafter)
    check_tensors(tensors, drafter.config)
    config = plain_config(drafter.config)
    if layout == "speculators":
        if verifier is None:
            raise ValueError("the speculators layout needs the target's name: give --target")
        depth = drafter.config.num_depths
        config = speculators_config(drafter.config, verifier, depth if k is None else k)
    elif k is not None:
        raise ValueError(
            "only the speculators layout holds k: leave it out, and give num_speculative_tokens to "
            "the engine"
        )
    folder = folder.resolve()  # a link stays: what it leads to is replaced
    staging = folder.with_name(f".{folder.name}.peagle-export")
    shutil.rmtree(staging, ignore_errors=True)  # of a killed export
    temporary = staging / "new"
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / "model.safetensors", metadata=METADATA)
    # The library writes for its own user only; an engine often runs as another one.
    (temporary / "model.safetensors").chmod(0o644)
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    check_folder(temporary)
    written = load_file(temporary / "model.safetensors")
    if not all(torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise OSError(f"{temporary}: what was read back differs from what was written")
    for path in temporary.iterdir():
        sync(path)
    if folder.exists():
        os.replace(folder, staging / "old")
    os.replace(temporary, folder)
    shutil.rmtree(staging)


def weights_sha256(drafter: Drafter) -> str:
    """Of the ``model.safetensors`` that an export of this drafter holds."""
    return hashlib.sha256(save(servable_tensors(drafter), metadata=METADATA)).hexdigest()


def refuse_foreign(folder: Path) -> None:
    """Raise ``ValueError`` unless the folder is missing, empty, or an earlier export alone.

    An export replaces its folder. Hence nothing else may lie in it, not even beside an export.
    """
    if not (place := existing(folder)).is_dir():
        raise ValueError(f"{place} is a file: give a folder of its own for the drafter")
    names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    foreign = sorted(names - EXPORTED)
    if foreign:
        raise ValueError(
            f"{folder} holds {foreign[0]}, which no export wrote, and an export replaces its "
            "folder: give a new folder"
        )
    if names and not is_export(folder / "config.json"):
        raise ValueError(f"{folder} is no earlier export, and would be replaced: give a new folder")


def is_export(config: Path) -> bool:
    """Whether an export wrote this file: an old or a damaged one, too, may be replaced."""
    try:
        return json.loads(config.read_text("utf-8"))["architectures"][0] in ARCHITECTURES
    except (OSError, ValueError, LookupError, TypeError):
        return False


def remove_export(folder: Path) -> None:
    """Remove an earlier export. Raises ``ValueError`` for a folder that is none."""
    refuse_foreign(folder)
    shutil.rmtree(folder, ignore_errors=True)


def speculators_config(config: PEagleConfig, verifier: Verifier, k: int) -> dict[str, Any]:
    """The speculators format. vLLM copies all of ``transformer_layer_config`` into the drafter's
    configuration but drops unknown fields beside it, so ``fc_norm`` and the like go inside."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    algorithm, name = ("peagle", "PEagle") if config.parallel_drafting else ("eagle3", "Eagle3")
    mask = {"mask_token_id": config.mask_token_id} if config.parallel_drafting else {}
    return {
        "speculators_model_type": algorithm,
        "architectures": [f"{name}Speculator"],
        "draft_vocab_size": config.draft_vocab_size,
        **mask,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "fc_norm": config.fc_norm,  # read here for eagle3, and inside for peagle
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": config.eagle_aux_hidden_state_layer_ids,
        "transformer_layer_config": plain_config(config),
        "speculators_config": {
            "algorithm": algorithm,
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": k}],
            "verifier": {"name_or_path": verifier.name, "architectures": verifier.architectures},
        },
    }
