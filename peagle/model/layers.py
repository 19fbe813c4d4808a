"""One decoder layer of the drafter, in the pieces that NTP, MTP and decoding share.

Names and order of operations are vLLM's (``model_executor/models/llama_eagle3.py``), so that a
state dict loads there as it is.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRotaryEmbedding

from peagle.kernels.reference import Angles, Reference
from peagle.model.config import PEagleConfig


class RMSNorm(nn.RMSNorm):
    """Holds the weight; the backend computes it, in the precision of its input."""

    def forward(self, x: Float[Tensor, "*T D"], ops: Reference) -> Float[Tensor, "*T D"]:
        return ops.rms_norm(x, self.weight, self.eps)


class FeedForward(LlamaMLP):
    """``down(silu(gate(x)) * up(x))``, or what the configuration asks for."""

    def forward(self, x: Float[Tensor, "T D"], ops: Reference) -> Float[Tensor, "T D"]:
        if self.config.hidden_act != "silu" or self.down_proj.bias is not None:
            return super().forward(x)
        weights = (part.weight for part in (self.gate_proj, self.up_proj, self.down_proj))
        return ops.feed_forward(x, *weights)


class Projections(nn.Module):
    """Query, key, value and output projections (``self_attn`` in the state dict)."""

    def __init__(self, config: PEagleConfig, width: int):
        super().__init__()
        self.head_dim = config.head_dim
        bias, heads, groups = (
            config.attention_bias,
            config.num_attention_heads,
            config.num_key_value_heads,
        )
        self.q_proj = nn.Linear(width, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(width, groups * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(width, groups * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, config.hidden_size, bias=bias)

    def forward(
        self, x: Float[Tensor, "T W"], ops: Reference
    ) -> tuple[Float[Tensor, "T A E"], Float[Tensor, "T G E"], Float[Tensor, "T G E"]]:
        """Queries, keys and values, before rotation."""
        split = (len(x), -1, self.head_dim)
        layers = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(ops.linear(x, layer.weight, layer.bias).view(split) for layer in layers)


class DrafterLayer(nn.Module):
    """A Llama layer. Layer 0 is wide: it reads ``[embedding ; hidden]``."""

    def __init__(self, config: PEagleConfig, index: int):
        super().__init__()
        width, eps = config.hidden_size, config.rms_norm_eps
        self.norm_before_residual = config.norm_before_residual
        self.input_layernorm = RMSNorm(width, eps=eps)
        self.post_attention_layernorm = RMSNorm(width, eps=eps)
        if index == 0:
            self.hidden_norm = RMSNorm(width, eps=eps)
        self.self_attn = Projections(config, 2 * width if index == 0 else width)
        self.mlp = FeedForward(config)

    def enter(
        self, hidden: Float[Tensor, "T D"], embedding: Float[Tensor, "T D"] | None, ops: Reference
    ) -> tuple[Float[Tensor, "T W"], Float[Tensor, "T D"]]:
        """Input of the projections, and the residual. Only layer 0 is given embeddings."""
        if embedding is None:
            return self.input_layernorm(hidden, ops), hidden
        normed = self.hidden_norm(hidden, ops)
        residual = normed if self.norm_before_residual else hidden
        return torch.cat([self.input_layernorm(embedding, ops), normed], -1), residual

    def leave(
        self, residual: Float[Tensor, "T D"], context: Float[Tensor, "T A E"], ops: Reference
    ) -> Float[Tensor, "T D"]:
        """Output projection, feed-forward and both residual additions."""
        out = self.self_attn.o_proj
        hidden = residual + ops.linear(context.flatten(1), out.weight, out.bias)
        return hidden + self.mlp(self.post_attention_layernorm(hidden, ops), ops)


class Rotary(nn.Module):
    """Rotary embedding of [T, heads, E] tensors at given positions, any transformers variant."""

    def __init__(self, config: PEagleConfig):
        super().__init__()
        self.table = LlamaRotaryEmbedding(config)

    def angles(self, position: Int[Tensor, " T"], dtype: torch.dtype) -> Angles:
        """Cosines and sines; ``F`` is half a head."""
        like = torch.empty(0, dtype=dtype, device=position.device)
        half = self.table.inv_freq.shape[0]  # the other half of the table repeats it
        cos, sin = self.table(like, position[None])
        return cos[0, :, None, :half], sin[0, :, None, :half]
