"""Which target it is, how to load it, and how to tell it apart from others."""

import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peagle.target.end_tokens import read_end_tokens

EMBEDDED = "tiny"  # the target that ships with the package


@dataclass(frozen=True)
class TargetSource:
    """Which target: ``tiny`` (embedded), a folder, or a Hub id with an optional revision."""

    name: str
    revision: str | None = None

    @property
    def path(self) -> str:
        return str(resources.files("peagle.tiny_target")) if self.name == EMBEDDED else self.name

    def config(self) -> PretrainedConfig:
        """The text model's configuration; raises ``ValueError`` for an unknown target."""
        return self.load(AutoConfig).get_text_config()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.load(AutoTokenizer)

    def model(self, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
        model = self.load(AutoModelForCausalLM, dtype=dtype, use_safetensors=True)
        return model.to(device).eval().requires_grad_(False)

    def load(self, factory: type, **options):
        """``from_pretrained`` that answers an unknown name with one sentence; no remote code."""
        try:
            return factory.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=False, **options
            )
        except (OSError, ValueError, KeyError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"target {self.name!r} cannot be opened: it must be a folder or a Hub id with a "
                f"transformers causal language model ({first})"
            ) from error

    def end_tokens(self) -> set[int]:
        return read_end_tokens(self.path, self.revision)

    def fingerprint(self) -> str:
        """Identity of the weights without loading them.

        A folder is known by its configuration and by size, head and tail of its weight files; a
        Hub id by the commit that its revision names.
        """
        folder = Path(self.path)
        if not folder.is_dir():
            config = hf_hub_download(self.name, "config.json", revision=self.revision)
            return Path(config).parent.name  # snapshots/<commit>/config.json
        digest = hashlib.sha256()
        for path in sorted([folder / "config.json", *folder.glob("*.safetensors")]):
            with open(path, "rb") as file:
                digest.update(f"{path.name} {path.stat().st_size}".encode())
                digest.update(file.read(1 << 20))
                file.seek(max(0, path.stat().st_size - (1 << 20)))
                digest.update(file.read())
        return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary, merges and chat template."""
    parts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
