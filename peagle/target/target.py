"""The target model: loading it, telling it apart from others, and reading its hidden states."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from peagle.target.head import TargetHead
from peagle.target.layers import TargetLayers, is_llama_layer

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
        return opened(AutoConfig, self).get_text_config()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return opened(AutoTokenizer, self)

    def model(self, *, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
        model = opened(AutoModelForCausalLM, self, dtype=dtype, use_safetensors=True)
        return model.to(device).eval().requires_grad_(False)

    def end_tokens(self) -> set[int]:
        """What ``end_tokens`` finds in the model, without loading it."""
        read = partial(GenerationConfig.from_pretrained, self.path, revision=self.revision)
        try:
            return ends_of(read())
        except OSError:  # there is none: the model's configuration may say it, as for transformers
            return ends_of(read(config_file_name="config.json"))

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


def opened(factory: type, source: TargetSource, **options):
    """``from_pretrained`` that answers an unknown name with one sentence; never remote code."""
    try:
        return factory.from_pretrained(
            source.path, revision=source.revision, trust_remote_code=False, **options
        )
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(
            f"target {source.name!r} cannot be opened: it must be a folder or a Hub id with a "
            f"transformers causal language model ({first})"
        ) from error


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of vocabulary, merges and chat template."""
    parts = (tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


class HiddenStates:
    """What the hooks of ``hidden_states`` saw in the last forward pass."""

    def __init__(self) -> None:
        self.entering: dict[int, Tensor] = {}

    def aux(self, layer_ids: tuple[int, ...]) -> Float[Tensor, "B n AD"]:
        return torch.cat([self.entering[k] for k in layer_ids], -1)


@contextmanager
def hidden_states(model: PreTrainedModel, layer_ids: tuple[int, ...]) -> Iterator[HiddenStates]:
    """Record the hidden states that enter the given layers, and the last layer's output.

    Id ``k`` is what enters layer ``k`` (vLLM's convention): 0 is the embedding and ``N`` the last
    layer's output before the final norm, which is always recorded. Nothing else is kept.
    """
    layers = decoder_layers(model)
    seen = HiddenStates()

    def record_input(k: int):
        def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.entering[k] = args[0] if args else kwargs["hidden_states"]

        return hook

    def record_last(module: nn.Module, args: tuple, output) -> None:
        seen.entering[len(layers)] = output[0] if isinstance(output, tuple) else output

    handles = [
        layers[k].register_forward_pre_hook(record_input(k), with_kwargs=True)
        for k in layer_ids
        if k < len(layers)
    ]
    handles.append(layers[-1].register_forward_hook(record_last))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    return model.get_decoder().layers


def target_head_of(model: PreTrainedModel, config: PretrainedConfig) -> TargetHead:
    """The target's embedding, final norm and head, as plain tensors.

    Norm and embedding are applied, which yields the effective weights whatever the family's
    convention (Gemma, say, stores ``weight - 1`` and scales embeddings).
    """
    device = model.device
    with torch.no_grad():
        embedding = model.get_input_embeddings()(torch.arange(config.vocab_size, device=device))
    return TargetHead(
        norm=final_norm_of(model, config),
        head=compact(model.get_output_embeddings().weight.detach()[: config.vocab_size]),
        embedding=compact(embedding),
        eps=config.rms_norm_eps,
        softcap=getattr(config, "final_logit_softcapping", None),
    )


@torch.no_grad()
def final_norm_of(model: PreTrainedModel, config: PretrainedConfig) -> Float[Tensor, " T"]:
    """The final norm's effective weight, in float32 unless the family rounds before it multiplies.

    Llama rounds to the model's precision and then multiplies, Gemma and GPT-OSS multiply first;
    ``TargetHead`` follows the weight's dtype, and so gets the target's logits to the last bit.
    """
    norm = model.get_decoder().norm
    weight = effective(norm, config.hidden_size, model.device)
    states = torch.randn(8, config.hidden_size, generator=torch.Generator().manual_seed(0))
    states = states.to(model.device, model.dtype)
    ours = F.rms_norm(states.float(), weight.shape, weight, config.rms_norm_eps)
    multiplied_first = torch.equal(ours.to(model.dtype), norm(states))
    return weight.cpu() if multiplied_first else compact(weight)


@torch.no_grad()
def effective(norm: nn.Module, width: int, device: torch.device) -> Float[Tensor, " T"]:
    """What an RMS norm multiplies by, as float32; the input is large so that eps plays no part."""
    return norm(torch.full((1, width), 2.0**12, device=device))[0].float()


@torch.no_grad()
def check_head(model: PreTrainedModel, head: TargetHead, ids: Int[Tensor, " n"]) -> None:
    """Raise ``ValueError`` unless the head rebuilds the target's own logits of a text.

    A family that does more to its logits than norm, projection and soft cap would otherwise
    train a drafter on another distribution than it serves.
    """
    with hidden_states(model, ()) as seen:
        theirs = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].cpu()
    ours = head(seen.entering[len(decoder_layers(model))][0].cpu())
    theirs = theirs[:, : ours.shape[-1]].float()
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < 0.02:  # bf16 rounds by 0.004; a forgotten factor or cap is far more
        raise ValueError(
            f"the logits of a target of type {model.config.model_type} cannot be rebuilt from its "
            f"last hidden state (relative error {error:.2g}): peagle does not support this family"
        )


def target_layers_of(
    model: PreTrainedModel, config: PretrainedConfig, indices: tuple[int, ...]
) -> TargetLayers:
    """Copies of the given layers; none unless they are plain Llama layers."""
    layers = [decoder_layers(model)[i] for i in indices]
    activation = getattr(config, "hidden_act", None)
    if not all(is_llama_layer(layer, activation) for layer in layers):
        return TargetLayers({})
    states = {}
    for index, layer in zip(indices, layers, strict=True):
        states[index] = {name: compact(tensor) for name, tensor in layer.state_dict().items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            norm = effective(layer.get_submodule(name), config.hidden_size, model.device)
            states[index][f"{name}.weight"] = compact(norm)
    return TargetLayers(states)


def compact(tensor: Tensor) -> Tensor:
    """As bf16 when that loses nothing (weights that were bf16 on disk), on the CPU, unshared."""
    half = tensor.to(torch.bfloat16)
    kept = half if torch.equal(half.to(tensor.dtype), tensor) else tensor
    return kept.detach().cpu().clone()


def end_tokens(model: PreTrainedModel) -> set[int]:
    """The tokens that end an answer, by the target's generation settings."""
    return ends_of(model.generation_config)


def ends_of(settings: GenerationConfig) -> set[int]:
    found = settings.eos_token_id
    if found is None:
        raise ValueError("the target's generation_config.json names no eos_token_id")
    return set(found) if isinstance(found, list) else {found}


def pick_device(device: str) -> str:
    """``auto`` is a GPU if there is one."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device
