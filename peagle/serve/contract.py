"""What a servable folder must hold: the tensors and fields that vLLM reads, and a check of both.

vLLM does not notice a missing tensor (its EAGLE-3 loader returns no list of what it loaded), so
a drafter without one layer would serve, and guess badly. Hence everything is compared here.
"""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter

Layout = Literal["eagle3", "speculators"]
FIELDS = (  # of config.json that vLLM reads, and that must agree with each other
    *("draft_vocab_size", "target_hidden_size", "num_depths", "rope_theta"),
    *("eagle_aux_hidden_state_layer_ids", "num_aux_hidden_states"),
    *("fc_norm", "norm_before_fc", "norm_before_residual"),
    *("parallel_drafting", "mask_token_id", "pard_token", "ptd_token_id"),
)


def servable_tensors(drafter: Drafter) -> dict[str, Tensor]:
    """The state dict in bf16; id maps keep their integer types."""
    return {
        name: (tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor)
        .detach()
        .cpu()
        .contiguous()
        for name, tensor in drafter.state_dict().items()
    }


def as_served(drafter: Drafter, dtype: torch.dtype) -> Drafter:
    """Weights rounded to bf16 and computed with in ``dtype``, in place.

    The frequencies of the rotary embedding are no weights: an engine has them in float32, and
    rounded ones would turn distant positions by whole radians.
    """
    for parameter in drafter.parameters():
        parameter.data = parameter.data.to(torch.bfloat16).to(dtype)
    return drafter


def expected_tensors(config: PEagleConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name, shape and dtype of every tensor of the contract (vLLM ``llama_eagle3.py``)."""
    width, aux = config.hidden_size, config.num_aux * config.target_hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (config.vocab_size, width),
        "fc.weight": (width, aux),
        "norm.weight": (width,),
        "lm_head.weight": (config.draft_vocab_size, width),
        "layers.0.hidden_norm.weight": (width,),
    }
    if config.parallel_drafting:
        shapes["mask_hidden"] = (1, 1, aux)
    if config.norm_before_fc:
        shapes["input_norm.weight"] = (aux,)
    if config.fc_norm:
        for i in range(config.num_aux):
            shapes[f"fc_norm.{i}.weight"] = (config.target_hidden_size,)
    for i in range(config.num_hidden_layers):
        for name, shape in layer_shapes(config, 2 * width if i == 0 else width).items():
            shapes[f"layers.{i}.{name}"] = shape
    expected = {name: (shape, torch.bfloat16) for name, shape in shapes.items()}
    if config.pruned:
        expected["d2t"] = ((config.draft_vocab_size,), torch.int64)
        expected["t2d"] = ((config.vocab_size,), torch.bool)
    return expected


def layer_shapes(config: PEagleConfig, entering: int) -> dict[str, tuple[int, ...]]:
    """The tensors that every layer has; layer 0 reads ``entering`` = two widths."""
    width, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    attention: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj.weight": (queries, entering),
        "self_attn.k_proj.weight": (keys, entering),
        "self_attn.v_proj.weight": (keys, entering),
        "self_attn.o_proj.weight": (width, queries),
    }
    if config.attention_bias:
        attention |= {
            name.replace("weight", "bias"): shape[:1] for name, shape in attention.items()
        }
    return attention | {
        "mlp.gate_proj.weight": (inner, width),
        "mlp.up_proj.weight": (inner, width),
        "mlp.down_proj.weight": (width, inner),
        "input_layernorm.weight": (width,),
        "post_attention_layernorm.weight": (width,),
    }


def refuse_unservable(config: PEagleConfig) -> None:
    """Raise ``ValueError`` for a design that exists for an ablation only."""
    if config.hidden_state != "shared":
        raise ValueError(
            f"a drafter with hidden_state {config.hidden_state!r} cannot be exported: vLLM serves "
            "the shared one only, so train with model.hidden_state: shared"
        )


def check_tensors(tensors: dict[str, Tensor], config: PEagleConfig) -> None:
    """Raise ``ValueError`` unless the tensors are exactly the contract's, finite and in range."""
    expected = expected_tensors(config)
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing from the drafter")
        if name not in expected:
            raise ValueError(f"tensor {name} is not part of a servable drafter")
        actual = (tuple(tensors[name].shape), tensors[name].dtype)
        if actual != expected[name]:
            raise ValueError(f"tensor {name} is {actual}, must be {expected[name]}")
        if not torch.isfinite(tensors[name]).all():
            raise ValueError(f"tensor {name} is not finite")
    if config.pruned:
        check_vocabulary(tensors["d2t"], tensors["t2d"])


def check_vocabulary(d2t: Tensor, t2d: Tensor) -> None:
    """``d2t`` must hold offsets (id + d2t[id]), and both maps must name the same tokens."""
    kept = torch.arange(len(d2t)) + d2t
    if not torch.equal(kept, torch.nonzero(t2d).flatten()):
        raise ValueError(
            "tensors d2t and t2d disagree: d2t must hold offsets to ascending target ids, and t2d "
            "must be true for exactly those ids"
        )


def plain_config(config: PEagleConfig) -> dict[str, Any]:
    """vLLM's plain EAGLE-3 format. Every name that some version reads is written."""
    rope = dict(config.rope_parameters)
    fields = config.to_dict()
    fields.pop("_name_or_path", None)  # a path of the machine it was once loaded on
    fields.pop("hidden_state")  # of what is served always the same
    plain = {
        **fields,
        "rope_theta": rope.pop("rope_theta"),  # transformers 4 reads this, 5 rope_parameters
        "num_aux_hidden_states": config.num_aux,  # else vLLM sizes fc for three layers
        "torch_dtype": "bfloat16",
        "dtype": "bfloat16",
    }
    if config.parallel_drafting:
        # Read by vLLM before 0.20.
        plain |= {"pard_token": config.mask_token_id, "ptd_token_id": config.mask_token_id}
    else:
        plain.pop("mask_token_id", None)
    if rope.get("rope_type", "default") != "default":
        plain["rope_scaling"] = rope  # transformers 4
    return plain


def read_config(folder: Path) -> PEagleConfig:
    """The drafter's configuration from a folder of either layout.

    Raises:
        ValueError: if the folder is not one that ``export`` writes, or a field that vLLM reads
            is missing or contradicts another.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a servable drafter: it has no config.json")
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        plain = written.get("transformer_layer_config", written)
        config = PEagleConfig.from_dict(plain)
        wanted = plain_config(config)
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{path} is not the configuration of a drafter: {error}") from error
    for name in FIELDS:
        for fields in (plain, written):
            if (fields is plain or name in written) and fields.get(name) != wanted.get(name):
                raise ValueError(
                    f"{path}: {name} is {fields.get(name)!r}, must be {wanted.get(name)!r}; "
                    "export the checkpoint again"
                )
    return config


def check_folder(folder: Path) -> PEagleConfig:
    """Raise ``ValueError`` unless vLLM would serve the folder completely; returns its settings."""
    config = read_config(folder)
    path = Path(folder) / "model.safetensors"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    try:
        check_tensors(tensors, config)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; export the checkpoint again") from error
    return config
