"""Tiny random targets of the families people serve, each built from its own configuration class.

The embedded target lends them its tokenizer, so that prompts, chat template and end tokens are
real. Weights are large enough that logits differ between tokens, and norms are not all one: a
norm that is left out, or taken in another family's convention, shows.
"""

import shutil
from importlib import resources

import torch
from transformers import (
    Gemma2Config,
    Gemma3Config,
    Gemma3TextConfig,
    Gemma4TextConfig,
    GenerationConfig,
    GptOssConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.models.auto import MODEL_FOR_CAUSAL_LM_MAPPING

from peagle.target.target import TargetSource

TOKENS = TargetSource("tiny").config()
WINDOW = 6  # of the families with sliding layers; shorter than every prompt of the tests
SHAPE = {
    "vocab_size": TOKENS.vocab_size,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": TOKENS.bos_token_id,
    "eos_token_id": TOKENS.eos_token_id,
    "pad_token_id": TOKENS.pad_token_id,
    "tie_word_embeddings": False,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
TIED = {"tie_word_embeddings": True}
KINDS = ["sliding_attention", "full_attention"] * 2
GEMMA = {"sliding_window": WINDOW, "layer_types": KINDS, **TIED}
CAPPED = {**GEMMA, "final_logit_softcapping": 4.0}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
}


def gemma3_with_images() -> Gemma3Config:
    text = Gemma3TextConfig(**{**SHAPE, **GEMMA}, query_pre_attn_scalar=16)
    return Gemma3Config(
        text_config=text.to_dict(),
        vision_config={"model_type": "siglip_vision_model", **VISION},
        mm_tokens_per_image=4,
        image_token_index=TOKENS.vocab_size - 1,
        boi_token_index=TOKENS.vocab_size - 2,
        eoi_token_index=TOKENS.vocab_size - 3,
        **TIED,
    )


FAMILIES = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "llama-tied": lambda: LlamaConfig(**{**SHAPE, **TIED}),
    "llama-decoupled-heads": lambda: LlamaConfig(**{**SHAPE, "head_dim": 24}),
    "qwen3": lambda: Qwen3Config(**{**SHAPE, "head_dim": 32}),  # 4 heads of 32 in a width of 64
    "qwen3-tied": lambda: Qwen3Config(**{**SHAPE, **TIED}),
    "qwen3-moe": lambda: Qwen3MoeConfig(**SHAPE, **MOE),
    "gpt-oss": lambda: GptOssConfig(
        **SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW
    ),
    "gemma2": lambda: Gemma2Config(**{**SHAPE, **CAPPED}, query_pre_attn_scalar=16),
    "gemma3": lambda: Gemma3TextConfig(**{**SHAPE, **CAPPED}, query_pre_attn_scalar=16),
    "gemma3-with-images": gemma3_with_images,
    "gemma4": lambda: Gemma4TextConfig(
        **{**SHAPE, **CAPPED}, global_head_dim=32, hidden_size_per_layer_input=0
    ),
}


def make_model(config: PretrainedConfig) -> PreTrainedModel:
    """The family's own causal language model, random, in float32; the same one each time."""
    torch.manual_seed(0)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)](config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else parameter.shape[-1] ** -0.5
            parameter.add_(torch.randn_like(parameter) * scale)
        # Says no special token: an answer does not end at once, and the mask token never occurs.
        model.get_output_embeddings().weight[:4] *= 1e-3
    return model.requires_grad_(False)


def write_target(family: str, folder) -> TargetSource:
    """Save a target of the family in bf16, as targets are published, with the tokenizer."""
    model = make_model(FAMILIES[family]()).to(torch.bfloat16)
    ids = {name: SHAPE[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    embedded = resources.files("peagle.tiny_target")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(str(embedded / name), folder / name)
    return TargetSource(str(folder))
