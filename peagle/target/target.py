"""Which target it is, how to load it, and how to tell it apart from others."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

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

from peagle.store.errors import reason
from peagle.store.shard import Span, read_spans
from peagle.target.end_tokens import read_end_tokens

EMBEDDED = "tiny"  # the target that ships with the package
LFS = b"version https://git-lfs"
SAMPLE = 4096  # bytes
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.*", "*.tiktoken", "tekken.json")


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
        """Raises ``ValueError`` that says so where a folder has none."""
        try:
            return self.load(AutoTokenizer)
        except ValueError as error:
            folder = Path(self.path)
            if not folder.is_dir() or any(any(folder.glob(name)) for name in TOKENIZERS):
                raise
            raise ValueError(
                f"target {self.name!r} has no tokenizer files (as tokenizer.json): copy those of "
                "the model that it was made from into the folder"
            ) from error

    def model(
        self,
        *,
        dtype: torch.dtype,
        device: torch.device | str,
        config: PretrainedConfig | None = None,
    ) -> PreTrainedModel:
        """The target with its weights, as its configuration says or as ``config`` does.

        Raises:
            ValueError: if it cannot be opened, or a tensor is missing or of another shape.
        """
        model, report = self.load(
            AutoModelForCausalLM,
            dtype=dtype,
            **({"config": config} if config else {}),
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # named below, as what is missing
            output_loading_info=True,
        )
        self.refuse_random_weights(report)
        return model.to(device).eval().requires_grad_(False)

    def refuse_random_weights(self, report: dict[str, Any]) -> None:
        """Raise ``ValueError`` with the tensors that transformers made up; ``report`` is its own.

        They are missing in the files, or do not have the shape that the configuration says.
        """
        shapes = [f"{name}: {tuple(found)}, and config.json says {tuple(wanted)}"
                  for name, found, wanted in sorted(report["mismatched_keys"])]  # fmt: skip
        for what, names in (
            ("lack", sorted(report["missing_keys"])),
            ("have tensors of another shape", shapes),
        ):
            if names:
                more = f" and {len(names) - 3} more" if len(names) > 3 else ""
                raise ValueError(
                    f"the weights of target {self.name!r} {what}: {', '.join(names[:3])}{more}; "
                    "get the files again"
                )

    def skeleton(self) -> PreTrainedModel:
        """The target without weights, on no device: which layers it has, known in seconds."""
        config = self.load(AutoConfig)
        with self.opening(), torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)

    def load(self, factory: type, **options):
        """``from_pretrained`` that answers an unknown name with one sentence; no remote code."""
        with self.opening():
            return factory.from_pretrained(
                self.path, revision=self.revision, trust_remote_code=False, **options
            )

    @contextmanager
    def opening(self) -> Iterator[None]:
        """What transformers raises for a target that it cannot open becomes one sentence."""
        if self.name.endswith(".gguf"):
            raise ValueError(
                f"target {self.name!r} is a GGUF file, and a folder of safetensors is needed; make "
                f"it once: python -m peagle.target.from_gguf {self.name} FOLDER"
            )
        try:
            yield
        except Exception as error:  # of any kind: missing packages, torn files, odd settings
            for path in weight_files(Path(self.path)):
                read_header(path)  # says better what is wrong
            raise ValueError(
                f"target {self.name!r} cannot be opened: it must be a folder or a Hub id with a "
                f"transformers causal language model ({reason(error)})"
            ) from error

    def end_tokens(self) -> set[int]:
        return read_end_tokens(self.path, self.revision, self.tokenizer())

    def fingerprint(self) -> str:
        """Identity of the weights without loading them.

        A folder is known by its configuration, by size, head and tail of its weight files, and,
        after a dash, by both ends of every tensor; a Hub id by the commit that its revision names.

        Raises:
            ValueError: for a file of weights that is torn, or only points at the real one.
        """
        folder = Path(self.path)
        if not folder.is_dir():
            config = hf_hub_download(self.name, "config.json", revision=self.revision)
            return Path(config).parent.name  # snapshots/<commit>/config.json
        digest = hashlib.sha256()
        weights = weight_files(folder)
        for path in sorted([folder / "config.json", *weights]):
            with open(path, "rb") as file:
                digest.update(f"{path.name} {path.stat().st_size}".encode())
                digest.update(file.read(1 << 20))
                file.seek(max(0, path.stat().st_size - (1 << 20)))
                digest.update(file.read())
        return f"{digest.hexdigest()[:16]}-{tensors_hash(weights)}"


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def read_header(path: Path) -> dict[str, Span]:
    """The tensors of a safetensors file. Raises ``ValueError`` if the file is not whole."""
    with open(path, "rb", buffering=0) as file:
        if file.read(len(LFS)) == LFS:
            raise ValueError(
                f"{path} is a pointer of Git LFS and not the weights: run `git lfs pull` there"
            )
        file.seek(0)
        try:
            return read_spans(file)
        except OSError as error:
            raise ValueError(f"{path} is torn ({error}): get it again") from error


def tensors_hash(paths: list[Path]) -> str:
    """Hash of both ends of every tensor: training changes some, and leaves sizes as they are."""
    digest = hashlib.sha256()
    for path in paths:
        spans = read_header(path)
        with open(path, "rb") as file:
            for name, span in sorted(spans.items()):
                digest.update(name.encode())
                for place in (span.start, max(span.start, span.stop - SAMPLE)):
                    file.seek(place)
                    digest.update(file.read(min(SAMPLE, span.stop - place)))
    return digest.hexdigest()[:16]


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary, merges and chat template."""
    parts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
