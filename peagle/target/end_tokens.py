"""The tokens that end an answer, by the target's generation settings."""

from transformers import GenerationConfig, PreTrainedModel


def end_tokens(model: PreTrainedModel) -> set[int]:
    return end_tokens_in(model.generation_config)


def read_end_tokens(path: str, revision: str | None) -> set[int]:
    """The same as ``end_tokens`` without loading the model."""
    try:
        settings = GenerationConfig.from_pretrained(path, revision=revision)
    except OSError:  # transformers, too, then reads them from the model's configuration
        settings = GenerationConfig.from_pretrained(
            path, revision=revision, config_file_name="config.json"
        )
    return end_tokens_in(settings)


def end_tokens_in(settings: GenerationConfig) -> set[int]:
    ids = settings.eos_token_id
    if ids is None:
        raise ValueError("the target's generation_config.json names no eos_token_id")
    return set(ids) if isinstance(ids, list) else {ids}
