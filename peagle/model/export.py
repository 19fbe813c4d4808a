"""The servable folder: ``config.json`` and ``model.safetensors`` exactly as vLLM reads them.

vLLM does not notice a missing tensor (its loader returns no list of what it loaded), so the
exporter checks the key set, every shape and dtype, that all is finite, and what was written.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from peagle.model.config import PEagleConfig
from peagle.model.drafter import PEagleDrafter

Layout = Literal["eagle3", "speculators"]


class Verifier(NamedTuple):
    """The target as the speculators layout names it; ``vllm serve DIR`` loads it by this name."""

    name: str
    architectures: list[str]


def export_drafter(
    drafter: PEagleDrafter,
    folder: Path,
    *,
    layout: Layout = "eagle3",
    verifier: Verifier | None = None,
) -> None:
    """Write the drafter in bf16; an existing folder is replaced only by a verified new one.

    Args:
        layout: ``eagle3`` is vLLM's plain format (``--speculative-config`` names the folder);
            ``speculators`` lets ``vllm serve DIR`` find target and settings by itself.
        verifier: the target, needed by the speculators layout.

    Raises:
        ValueError: naming the tensor that is missing, unexpected, misshapen or not finite.
    """
    tensors = servable_tensors(drafter)
    check_tensors(tensors, drafter.config)
    config = plain_config(drafter.config)
    if layout == "speculators":
        if verifier is None:
            raise ValueError("the speculators layout needs the target's name: give --target")
        config = speculators_config(drafter.config, verifier)
    temporary = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
    (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    written = load_file(temporary / "model.safetensors")
    if not all(torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise OSError(f"{temporary}: what was read back differs from what was written")
    replace_folder(temporary, folder)


def servable_tensors(drafter: PEagleDrafter) -> dict[str, Tensor]:
    """The state dict in bf16; id maps keep their integer types."""
    return {
        name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
        .detach()
        .cpu()
        .contiguous()
        for name, tensor in drafter.state_dict().items()
    }


def expected_tensors(config: PEagleConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor of the contract (vLLM ``llama_eagle3.py``)."""
    width, inner = config.hidden_size, config.intermediate_size
    heads = config.num_attention_heads * config.head_dim
    groups = config.num_key_value_heads * config.head_dim
    aux = config.num_aux * config.target_hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, width),
        "fc.weight": (width, aux),
        "mask_hidden": (1, 1, aux),
        "norm.weight": (width,),
        "lm_head.weight": (config.draft_vocab_size, width),
        "layers.0.hidden_norm.weight": (width,),
    }
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (aux,)
    if config.fc_norm:
        for i in range(config.num_aux):
            shapes[f"fc_norm.{i}.weight"] = (config.target_hidden_size,)
    for i in range(config.num_hidden_layers):
        layer, entering = f"layers.{i}", 2 * width if i == 0 else width
        attention = {
            "q_proj": (heads, entering),
            "k_proj": (groups, entering),
            "v_proj": (groups, entering),
            "o_proj": (width, heads),
        }
        for name, shape in attention.items():
            shapes[f"{layer}.self_attn.{name}.weight"] = shape
            if config.attention_bias:
                shapes[f"{layer}.self_attn.{name}.bias"] = shape[:1]
        for name, shape in {
            "gate_proj": (inner, width),
            "up_proj": (inner, width),
            "down_proj": (width, inner),
        }.items():
            shapes[f"{layer}.mlp.{name}.weight"] = shape
        shapes[f"{layer}.input_layernorm.weight"] = (width,)
        shapes[f"{layer}.post_attention_layernorm.weight"] = (width,)
    expected = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    if config.pruned:
        expected["d2t"] = ((config.draft_vocab_size,), torch.int64)
        expected["t2d"] = ((config.vocab_size,), torch.bool)
    return expected


def check_tensors(tensors: dict[str, Tensor], config: PEagleConfig) -> None:
    """Raise ``ValueError`` unless the tensors are exactly the contract's, and finite."""
    expected = expected_tensors(config)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing from the drafter")
        if name not in expected:
            raise ValueError(f"tensor {name} is not part of a servable drafter")
        found = (tuple(tensors[name].shape), tensors[name].dtype)
        if found != expected[name]:
            raise ValueError(f"tensor {name} is {found}, must be {expected[name]}")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"tensor {name} is not finite")


def plain_config(config: PEagleConfig) -> dict[str, Any]:
    """vLLM's plain EAGLE-3 format. Every name that some version reads is written."""
    rope = dict(config.rope_parameters or {})
    return {
        **config.to_dict(),
        "rope_theta": rope.get("rope_theta"),  # transformers 4 reads this, 5 rope_parameters
        "num_aux_hidden_states": config.num_aux,  # else vLLM sizes fc for three layers
        "pard_token": config.mask_token_id,  # read by vLLM before 0.20
        "ptd_token_id": config.mask_token_id,
        "parallel_drafting": True,
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }


def speculators_config(config: PEagleConfig, verifier: Verifier) -> dict[str, Any]:
    """The speculators format. vLLM copies all of ``transformer_layer_config`` into the drafter's
    configuration but drops unknown fields beside it, so ``fc_norm`` and the like go inside."""
    plain = plain_config(config)
    return {
        "speculators_model_type": "peagle",
        "architectures": ["PEagleSpeculator"],
        "draft_vocab_size": config.draft_vocab_size,
        "mask_token_id": config.mask_token_id,
        "norm_before_residual": config.norm_before_residual,
        "norm_before_fc": config.norm_before_fc,
        "target_hidden_size": config.target_hidden_size,
        "eagle_aux_hidden_state_layer_ids": config.eagle_aux_hidden_state_layer_ids,
        "transformer_layer_config": plain,
        "speculators_config": {
            "algorithm": "peagle",
            "default_proposal_method": "greedy",
            "proposal_methods": [
                {"proposal_type": "greedy", "speculative_tokens": config.num_depths}
            ],
            "verifier": {"name_or_path": verifier.name, "architectures": verifier.architectures},
        },
    }


def replace_folder(temporary: Path, folder: Path) -> None:
    """Put a finished folder in the place of an older one."""
    for path in temporary.iterdir():
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    old = folder.with_name(folder.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)
