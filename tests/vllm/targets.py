"""Small targets of other families than the embedded one, with its tokenizer and random weights."""

import shutil
from importlib import resources

import torch
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PretrainedConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

EMBEDDED = resources.files("peagle.tiny_target")
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SHAPE = {
    "head_dim": 64,  # vLLM's attention on a CPU knows only some sizes
    "initializer_range": 0.02,  # larger: noise that no drafter can learn
    "tie_word_embeddings": False,
    **SPECIAL,
}


def llama(shape):
    config = LlamaConfig(
        **shape,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    return LlamaForCausalLM(config)


def qwen3(shape):
    config = Qwen3Config(
        **shape,
        hidden_size=192,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,  # times head_dim is more than the width, as in Qwen3-4B
        num_key_value_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )
    return Qwen3ForCausalLM(config)


FAMILIES = {"llama": llama, "qwen3": qwen3}


def make_target(family, folder):
    """Write a target of the family; the same one each time."""
    embedded = PretrainedConfig.from_pretrained(str(EMBEDDED))
    tokenizer = AutoTokenizer.from_pretrained(str(EMBEDDED))
    sizes = {name: getattr(embedded, name) for name in ("vocab_size", "max_position_embeddings")}
    torch.manual_seed(0)
    model = FAMILIES[family]({**SHAPE, **sizes}).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight *= 20  # random logits are flat: a divergence would teach nothing
        # It never says a special token: the mask token must not occur, and answers go on.
        model.lm_head.weight[tokenizer.all_special_ids] = 0
    model.generation_config = GenerationConfig(**SPECIAL)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(str(EMBEDDED / name), folder / name)
