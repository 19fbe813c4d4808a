"""The target's final norm and head: its logits from stored hidden states, without the target."""

from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from peagle.kernels.cpu.packed_weight import Weight
from peagle.store.errors import StoreError
from peagle.store.index import IDENTITY
from peagle.store.sample import digest

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
        try:
            with safe_open(path, "pt") as file:
                hashes = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in TENSORS}
        except (SafetensorError, OSError) as error:
            raise StoreError(path.parent, f"{path.name} cannot be read ({error})") from error
        found = hashes.pop(IDENTITY.decode(), None)
        if identity and found and found != identity:
            raise StoreError(path.parent, f"{path.name} belongs to a store of another target")
        for name, hash_ in hashes.items():
            if name not in tensors or digest(tensors[name]) != hash_:
                raise StoreError(path.parent, f"{path.name}: {name} is corrupt (its hash differs)")
        return cls(**tensors, eps=eps, softcap=softcap)

    def save(self, path: Path, identity: str | None = None) -> None:
        """With the ``identity`` of its store's manifest it cannot be mistaken for another's."""
        tensors = {name: getattr(self, name).contiguous() for name in TENSORS}
        metadata = {name: digest(t) for name, t in tensors.items()}
        if identity is not None:
            metadata[IDENTITY.decode()] = identity
        save_file(tensors, path, metadata=metadata)

    def restricted(self, token_ids: Tensor) -> "TargetHead":
        """The same head over the given tokens only (the draft vocabulary)."""
        return TargetHead(
            norm=self.norm,
            head=self.head[token_ids],
            embedding=self.embedding[:0],  # only needed where a drafter starts
            eps=self.eps,
            softcap=self.softcap,
        )

    def factor(self, *, lasting: bool = False) -> Weight:
        """The head as products want it."""
        return Weight(self.head, self.head.dtype, lasting=lasting)

    @torch.no_grad()
    def forward(
        self, final: Float[Tensor, "P T"], weight: Weight | None = None
    ) -> Float[Tensor, "P W"]:
        """The target's logits, rounded where the target rounds, as float32.

        ``weight``: the head's own ``factor``, where it serves many calls.
        """
        states = F.rms_norm(final.float(), (final.shape[-1],), None, self.eps)
        states = states.to(self.norm.dtype) * self.norm
        weight = self.factor() if weight is None else weight
        with torch.autocast(final.device.type, enabled=False):
            logits = weight.product(states.to(weight.dtype))
        if self.softcap:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits.float()
