"""The tokens that end an answer where vLLM serves the target.

vLLM stops at what the generation settings name and at the tokenizer's own end token. Many chat
models end their turns with one that only one of the two names.
"""

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Raises ``ValueError`` where nothing names one."""
    return end_tokens_in(model.generation_config, tokenizer)


def read_end_tokens(
    path: str, revision: str | None, tokenizer: PreTrainedTokenizerBase
) -> set[int]:
    """The same as ``end_tokens`` without loading the model."""
    try:
        settings = GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:  # transformers, too, then reads them from the model's configuration
        settings = GenerationConfig.from_pretrained(
            path, revision=revision, config_file_name="config.json"
        )
    return end_tokens_in(settings, tokenizer)


def end_tokens_in(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    ids = settings.eos_token_id
    ends = {*(ids if isinstance(ids, list) else [ids]), tokenizer.eos_token_id} - {None}
    if not ends:
        raise ValueError(
            "neither the target's generation_config.json nor its tokenizer names an eos_token_id"
        )
    return ends
