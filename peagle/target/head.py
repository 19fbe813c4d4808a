"""The target's final norm and head: its logits from stored hidden states, without the target.

The norm is an RMS norm. A family with another norm, or one that does more to its logits than norm,
projection and soft cap, is refused by ``check_head``.
"""

from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from peagle.kernels.device import without_autocast
from peagle.kernels.reference import Reference
from peagle.target.hidden_states import hidden_states
from peagle.target.weights import compact, read_weights, rms_norm_weight, write_weights

TENSORS = ("norm", "head", "embedding")


class TargetHead(nn.Module):
    """Frozen; turns ``final`` (the last layer's output, before the norm) into logits."""

    def __init__(
        self,
        *,
        norm: Float[Tensor, " T"],
        head: Float[Tensor, "W T"],
        embedding: Float[Tensor, "V T"],
        eps: float,
        softcap: float | None,
    ):
        super().__init__()
        self.eps, self.softcap = eps, softcap
        self.register_buffer("norm", norm, persistent=False)
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("embedding", embedding, persistent=False)

    @classmethod
    def load(
        cls, path: Path, *, eps: float, softcap: float | None, identity: str | None = None
    ) -> "TargetHead":
        """Read the ``target.safetensors`` that capture left beside the shards.

        Raises:
            ValueError: if it is missing, damaged, or of a store with another ``identity``.
        """
        return cls(**read_weights(path, identity, names=TENSORS), eps=eps, softcap=softcap)

    def save(self, path: Path, identity: str | None = None) -> None:
        write_weights(path, {name: getattr(self, name) for name in TENSORS}, identity)

    def restricted(self, token_ids: Tensor) -> "TargetHead":
        """The same head over the given tokens only (the draft vocabulary)."""
        return TargetHead(
            norm=self.norm,
            head=self.head[token_ids],
            embedding=self.embedding[:0],  # only needed where a drafter starts
            eps=self.eps,
            softcap=self.softcap,
        )

    @torch.no_grad()
    def forward(
        self, final: Float[Tensor, "P T"], ops: Reference | None = None
    ) -> Float[Tensor, "P W"]:
        """The target's logits, rounded where the target rounds, as float32.

        ``ops``: the backend that multiplies; default plain PyTorch.
        """
        states = F.rms_norm(final.float(), (final.shape[-1],), None, self.eps)
        states = (states.to(self.norm.dtype) * self.norm).to(self.head.dtype)
        with without_autocast(final.device):
            logits = (ops or Reference()).product(states, self.head)
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.float()


def target_head_of(model: PreTrainedModel, config: PretrainedConfig) -> TargetHead:
    """The target's embedding, final norm and head, as plain tensors.

    Norm and embedding are applied, which yields the effective weights whatever the family's
    convention (Gemma, say, stores ``weight - 1`` and scales embeddings).
    """
    with torch.no_grad():
        tokens = torch.arange(config.vocab_size, device=model.device)
        embedding = model.get_input_embeddings()(tokens)
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
    weight = rms_norm_weight(norm, config.hidden_size, model.device)
    states = torch.randn(8, config.hidden_size, generator=torch.Generator().manual_seed(0))
    states = states.to(model.device, model.dtype)
    ours = F.rms_norm(states.float(), weight.shape, weight, config.rms_norm_eps)
    multiplied_first = torch.equal(ours.to(model.dtype), norm(states))
    return weight.cpu() if multiplied_first else compact(weight)


@torch.no_grad()
def check_head(model: PreTrainedModel, head: TargetHead, ids: Int[Tensor, " n"]) -> None:
    """Raise ``ValueError`` unless the head rebuilds the target's own logits of a text.

    Otherwise a drafter would be trained on another distribution than the target serves. NaN is
    said by its name.
    """
    with hidden_states(model, ()) as states:
        theirs = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0].cpu()
    ours = head(states.final[0].cpu())
    theirs = theirs[:, : ours.shape[-1]].float()
    if theirs.isnan().any():
        raise ValueError(
            f"the target's logits are NaN in {model.dtype}: get its weights again, or give another "
            "capture.dtype"
        )
    error = float((ours - theirs).norm() / theirs.norm())
    if not error < 0.02:  # bf16 rounds by 0.004; a forgotten factor or cap is far more
        raise ValueError(
            f"the logits of a target of type {model.config.model_type} cannot be rebuilt from its "
            f"last hidden state (relative error {error:.2g}): peagle does not support this family"
        )
