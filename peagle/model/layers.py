"""One decoder layer of the drafter, in the pieces that the two streams and decoding share.

Names and order of operations are vLLM's (``model_executor/models/llama_eagle3.py``), so that a
state dict loads there as it is.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from peagle.kernels.cuda.compiled import fused
from peagle.kernels.feed_forward import FeedForward
from peagle.model.config import PEagleConfig


class RMSNorm(nn.RMSNorm):
    """Stays in the precision of its input: the fused kernel wants the weight in the same."""

    def forward(self, x: Float[Tensor, "*T D"]) -> Float[Tensor, "*T D"]:
        if x.device.type == "cpu":
            return _Norm.apply(x.flatten(0, -2), self.weight, self.eps).view(x.shape)
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _Norm(torch.autograd.Function):
    """The CPU has no kernel for it: composed of PyTorch's parts it takes three times the passes."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        exact = torch.promote_types(x.dtype, torch.float32)
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=exact)
        scale = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        inputs, weight, scale = ctx.saved_tensors
        x, grad, exact = (t.to(scale.dtype) for t in (inputs, grad, weight))
        product = grad * x
        grad_weight = (scale.T @ product)[0]
        along = (product @ exact)[:, None] * scale.square() / x.shape[-1]
        grad_x = (grad * exact).addcmul_(x, along, value=-1).mul_(scale)
        return grad_x.to(inputs.dtype), grad_weight.to(weight.dtype), None


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
        self, x: Float[Tensor, "T W"]
    ) -> tuple[Float[Tensor, "T A E"], Float[Tensor, "T G E"], Float[Tensor, "T G E"]]:
        """Queries, keys and values, before rotation."""
        split = (len(x), -1, self.head_dim)
        return self.q_proj(x).view(split), self.k_proj(x).view(split), self.v_proj(x).view(split)


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
        self, hidden: Float[Tensor, "T D"], embedding: Float[Tensor, "T D"] | None
    ) -> tuple[Float[Tensor, "T W"], Float[Tensor, "T D"]]:
        """Input of the projections, and the residual. Only layer 0 is given embeddings."""
        if embedding is None:
            return self.input_layernorm(hidden), hidden
        normed = self.hidden_norm(hidden)
        residual = normed if self.norm_before_residual else hidden
        return torch.cat([self.input_layernorm(embedding), normed], -1), residual

    def leave(
        self, residual: Float[Tensor, "T D"], context: Float[Tensor, "T A E"]
    ) -> Float[Tensor, "T D"]:
        """Output projection, feed-forward and both residual additions."""
        hidden = residual + self.self_attn.o_proj(context.flatten(1))
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Rotary(nn.Module):
    """Rotary embedding of [T, heads, E] tensors at given positions, any transformers variant."""

    def __init__(self, config: PEagleConfig):
        super().__init__()
        self.table = LlamaRotaryEmbedding(config)

    def angles(
        self, position: Int[Tensor, " T"], dtype: torch.dtype
    ) -> tuple[Float[Tensor, "T 1 F"], Float[Tensor, "T 1 F"]]:
        """Cosines and sines; ``F`` is half a head."""
        like = torch.empty(0, dtype=dtype, device=position.device)
        half = self.table.inv_freq.shape[0]  # the other half of the table repeats it
        cos, sin = self.table(like, position[None])
        return cos[0, :, None, :half], sin[0, :, None, :half]


def rotate(
    x: Float[Tensor, "#T A E"], angles: tuple[Float[Tensor, "T 1 F"], Float[Tensor, "T 1 F"]]
) -> Float[Tensor, "T A E"]:
    """In the precision of the angles; one row stands for all when ``x`` has only one."""
    return _Rotation.apply(x, *angles)


class _Rotation(torch.autograd.Function):
    """Its backward is a rotation back: a third of the passes of autograd's own."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return turned(x, cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return turned(grad, cos, -sin).sum_to_size(ctx.shape).to(ctx.dtype), None, None


def turned(
    x: Float[Tensor, "#T A E"], cos: Float[Tensor, "T 1 F"], sin: Float[Tensor, "T 1 F"]
) -> Float[Tensor, "T A E"]:
    if x.is_cuda:
        return turned_at_once(x, cos, sin)
    x = x.to(cos.dtype)
    first, second = x.chunk(2, -1)
    out = x.new_empty(len(cos), *x.shape[1:])
    low, high = out.chunk(2, -1)
    torch.mul(first, cos, out=low).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=high).addcmul_(first, sin)
    return out


@fused
def turned_at_once(
    x: Float[Tensor, "#T A E"], cos: Float[Tensor, "T 1 F"], sin: Float[Tensor, "T 1 F"]
) -> Float[Tensor, "T A E"]:
    first, second = x.to(cos.dtype).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
