"""Embedding, final norm, head and single layers of a target, without loading the rest of it."""

import re
from collections.abc import Iterable
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig
from transformers.utils import logging

from peagle.target.head import TargetHead, target_head_of
from peagle.target.hidden_states import decoder_layers
from peagle.target.layers import LLAMA_LAYER, TargetLayers, target_layers_of
from peagle.target.target import TargetSource, weight_files


def head_from_files(target: TargetSource, dtype: torch.dtype) -> TargetHead:
    """The target's embedding, final norm and head: it is loaded as if it had no layers.

    Raises:
        ValueError: if a tensor is missing or quantised.
    """
    config = target.load(AutoConfig)
    for part in (config, config.get_text_config()):
        part.num_hidden_layers = 0
        if getattr(part, "layer_types", None):
            part.layer_types = []
        if hasattr(part, "quantization_config"):
            del part.quantization_config  # of the layers; embedding and head are left as they are
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it would list all the layers
    try:
        return target_head_of(
            target.model(dtype=dtype, device="cpu", config=config), target.config()
        )
    finally:
        logging.set_verbosity(verbosity)


def layers_from_files(target: TargetSource, indices: tuple[int, ...]) -> TargetLayers:
    """Copies of the given layers; none where they are quantised, or no plain Llama layers."""
    if quantization_of(target.load(AutoConfig)):
        return TargetLayers({})
    model = target.skeleton()
    layers, files = decoder_layers(model), weight_files(local_folder(target))
    if all(set(layers[index].state_dict()) == LLAMA_LAYER for index in indices):
        for index in indices:
            tensors = layer_tensors(files, index)
            layer = layers[index].to(tensors["input_layernorm.weight"].dtype)
            layer.to_empty(device="cpu").load_state_dict(tensors)
    return target_layers_of(model, target.config(), indices)


def layer_tensors(files: Iterable[Path], index: int) -> dict[str, Tensor]:
    """A Llama layer's tensors by their names in it.

    Raises:
        ValueError: if the files have no such layer that is whole.
    """
    name_of = re.compile(rf"(.*\b)layers\.{index}\.(.+)")
    found: dict[str, dict[str, Tensor]] = {}  # by what stands before: encoders have layers too
    for path in files:
        with safe_open(path, "pt") as file:
            for key in file.keys():
                if (match := name_of.fullmatch(key)) and match[2] in LLAMA_LAYER:
                    found.setdefault(match[1], {})[match[2]] = file.get_tensor(key)
    whole = [tensors for tensors in found.values() if set(tensors) == LLAMA_LAYER]
    if len(whole) != 1:
        raise ValueError(
            f"the target's weights have no whole layer {index}: get the files again, or leave out "
            "start_layers"
        )
    return whole[0]


def local_folder(target: TargetSource) -> Path:
    """Where the target's files are: its own folder, or the Hub's cache of its revision."""
    folder = Path(target.path)
    if folder.is_dir():
        return folder
    return Path(hf_hub_download(target.name, "config.json", revision=target.revision)).parent


def quantization_of(config: PretrainedConfig) -> str | None:
    """How the target's weights are quantised (``fp8``, ``awq``, ``mxfp4`` ...), if they are."""
    for part in (config, config.get_text_config()):
        settings = getattr(part, "quantization_config", None)
        if settings:
            method = settings if isinstance(settings, dict) else settings.to_dict()
            return str(method.get("quant_method", "unknown"))
    return None
