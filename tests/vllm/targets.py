"""Small targets of other families than the embedded one, with its tokenizer and random weights."""

import shutil
from importlib import resources

import torch
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SHAPE = {
    "vocab_size": 3072,
    "head_dim": 64,  # vLLM's attention on a CPU knows only some sizes
    "initializer_range": 0.02,  # larger: noise that no drafter can learn
    "max_position_embeddings": 1024,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(
            **SHAPE,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=2,
            num_key_value_heads=1,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **SHAPE,
            hidden_size=192,
            intermediate_size=256,
            num_hidden_layers=6,
            num_attention_heads=4,  # times head_dim is more than the width, as in Qwen3-4B
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
        )
    ),
}


def make_target(family, folder):
    """Write a target of the family; the same one each time."""
    torch.manual_seed(0)
    model = FAMILIES[family]().to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight *= 20  # random logits are flat: a divergence would teach nothing
        model.lm_head.weight[:4] = 0  # never says a special token: the mask token must not occur
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.save_pretrained(folder)
    embedded = resources.files("peagle.tiny_target")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(str(embedded / name), folder / name)
