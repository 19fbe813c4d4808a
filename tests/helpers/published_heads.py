"""Folders of drafters as others publish them."""

import json
from pathlib import Path

import torch
from safetensors.torch import load, save_file
from torch import Tensor

from peagle.model.drafter import Drafter
from peagle.serve.contract import plain_config, servable_tensors


def write_head(
    folder: Path,
    drafter: Drafter,
    *,
    settings: dict | None = None,
    tensors: dict[str, Tensor | None] | None = None,
) -> Path:
    """An exported folder with other settings and tensors; ``None`` leaves one out."""
    folder.mkdir(parents=True)
    config = plain_config(drafter.config) | (settings or {})
    weights = servable_tensors(drafter) | (tensors or {})
    given = {name: value for name, value in config.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(given))
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")
    return folder


def aws_head(folder: Path, drafter: Drafter) -> Path:
    """As AWS's P-EAGLE heads are: see docs/recipes.md."""
    config = drafter.config
    left_out = ("mask_token_id", "pard_token", "eagle_aux_hidden_state_layer_ids", "num_depths")
    left_out += ("num_aux_hidden_states", "parallel_drafting", "rope_parameters")
    write_head(
        folder,
        drafter,
        settings=dict.fromkeys(left_out) | {"ptd_token_id": str(config.mask_token_id)},
        tensors={
            "d2t": torch.zeros(config.vocab_size, dtype=torch.long),
            "t2d": torch.ones(config.vocab_size, dtype=torch.bool),
            "layers.1.hidden_norm.weight": torch.ones(config.hidden_size),
        },
    )
    path = folder / "model.safetensors"
    renamed = {
        name.replace("layers.0.", "midlayer."): tensor
        for name, tensor in load(path.read_bytes()).items()
    }
    renamed["mask_hidden"] = renamed["mask_hidden"].flatten()
    save_file(renamed, path)
    return folder
