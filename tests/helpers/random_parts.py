"""Tiny random targets, drafters, samples and manifests that the tests share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from peagle.model.build import build_drafter
from peagle.model.config import PEagleConfig
from peagle.model.drafter import Drafter
from peagle.store.manifest import Manifest
from peagle.store.sample import Sample
from peagle.store.writer import StoreWriter
from peagle.target.head import TargetHead
from peagle.target.layers import TargetLayers

WIDTH, VOCABULARY, LAYER_IDS = 32, 48, (1, 2, 3)
BLOCK = {
    "hidden_size": WIDTH,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "max_position_embeddings": 512,
}


def make_drafter(**changes) -> Drafter:
    """A random drafter in float64, with large weights so that errors show; EAGLE-3's where
    drafting is not parallel."""
    settings = {"num_hidden_layers": 2, "vocab_size": VOCABULARY, "mask_token_id": 5, **BLOCK}
    config = PEagleConfig(**{**settings, "eagle_aux_hidden_state_layer_ids": LAYER_IDS, **changes})
    drafter = build_drafter(config).double()
    with torch.no_grad():
        for parameter in drafter.parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.4 if parameter.ndim == 2 else 1.0))
        if config.pruned:
            kept = torch.randperm(config.vocab_size)[: config.draft_vocab_size].sort().values
            drafter.d2t.copy_(kept - torch.arange(len(kept)))
            drafter.t2d[kept] = True
    return drafter


def make_target(num_layers: int = 4) -> LlamaForCausalLM:
    """A random Llama target in float64."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, num_hidden_layers=num_layers, eos_token_id=1, **BLOCK
    )
    target = LlamaForCausalLM(config).double().eval()
    with torch.no_grad():
        for parameter in target.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) * 0.3)
    return target


def make_head(dtype: torch.dtype = torch.float32) -> TargetHead:
    return TargetHead(
        norm=torch.rand(WIDTH, dtype=dtype) + 0.5,
        head=torch.randn(VOCABULARY, WIDTH, dtype=dtype),
        embedding=torch.randn(VOCABULARY, WIDTH, dtype=dtype),
        eps=1e-6,
        softcap=None,
    )


def make_sample(length: int, seed: int, prompt: int = 3) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(length, (len(LAYER_IDS) + 1) * WIDTH, generator=generator)
    states = states.to(torch.bfloat16)
    mask = torch.ones(length, dtype=torch.bool)
    mask[:prompt] = False
    return Sample(
        input_ids=torch.randint(6, VOCABULARY, (length,), generator=generator),
        loss_mask=mask,
        aux=states[:, :-WIDTH].contiguous(),
        final=states[:, -WIDTH:].contiguous(),
    )


def make_manifest(**changes) -> Manifest:
    return Manifest(
        **{
            "target": "random",
            "revision": None,
            "fingerprint": "f00d",
            "layer_ids": LAYER_IDS,
            "hidden_size": WIDTH,
            "vocab_size": VOCABULARY,
            "num_layers": 4,
            "dtype": "bfloat16",
            "tokenizer": "beef",
            "rms_norm_eps": 1e-6,
            "softcap": None,
            "block": BLOCK,
            "answers": "cafe",
            **changes,
        }
    )


def write_random_store(folder, conversations, *, per_shard):
    """A complete store of random conversations of 10 to 40 tokens, every sixth for validation."""
    writer = StoreWriter(folder, shard_bytes=10**9)
    for number in range(conversations):
        split = "val" if number % 6 == 0 else "train"
        writer.append(f"{number:016x}", split, make_sample(10 + (number * 7) % 31, number))
        if (number + 1) % per_shard == 0:
            writer.flush()
    make_head(torch.bfloat16).save(folder / "target.safetensors")
    TargetLayers({}).save(folder / "target_layers.safetensors")
    make_manifest().write(folder)
    return folder
