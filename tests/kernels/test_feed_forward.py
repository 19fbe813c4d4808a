"""The feed-forward in fewer passes against transformers' own."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from peagle.kernels import feed_forward
from peagle.kernels.cpu import backend
from peagle.kernels.cpu.backend import Cpu
from peagle.model.layers import FeedForward


class Fast(nn.Module):
    """A feed-forward with the CPU's backend."""

    def __init__(self, mlp: FeedForward):
        super().__init__()
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.mlp(x, Cpu())


def pair(**settings) -> tuple[LlamaMLP, Fast]:
    config = LlamaConfig(hidden_size=32, intermediate_size=56, **settings)
    plain, fast = LlamaMLP(config), FeedForward(config)
    fast.load_state_dict(plain.state_dict())
    return plain, Fast(fast)


def outcome(module: torch.nn.Module, rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Result and gradients of input and weights."""
    draw = torch.Generator().manual_seed(0)
    x, onward = (torch.randn(rows, 32, generator=draw).to(dtype) for _ in range(2))
    x.requires_grad_()
    out = module(x)
    return [out, *torch.autograd.grad(out, [x, *module.parameters()], onward.to(out.dtype))]


@pytest.mark.parametrize("rows", [1, 37, 300])
@pytest.mark.parametrize("elements", [1, 1000])  # one row at a time, and a few
@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-13), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)]
)
def test_result_and_gradients_are_those_of_float64(rows, elements, dtype, near, monkeypatch):
    monkeypatch.setattr(backend, "CACHE_ELEMENTS", elements)
    plain, fast = pair()
    wanted = outcome(plain.double(), rows, torch.float64)
    found = outcome(fast.to(dtype), rows, dtype)
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() < near * other.norm()


def test_autocast_computes_in_bf16_and_gives_gradients_in_the_precision_of_weights():
    plain, fast = pair()
    with torch.autocast("cpu", torch.bfloat16):
        found = outcome(fast, 50, torch.float32)
    assert found[0].dtype == torch.bfloat16
    assert all(grad.dtype == torch.float32 for grad in found[1:])
    wanted = outcome(plain.double(), 50, torch.float64)
    for one, other in zip(found, wanted, strict=True):
        assert (one.double() - other).norm() < 2e-2 * other.norm()


@pytest.mark.parametrize("settings", [{"hidden_act": "gelu"}, {"mlp_bias": True}])
def test_what_is_not_plain_is_left_to_transformers(settings, monkeypatch):
    monkeypatch.setattr(feed_forward, "_FeedForward", None)
    plain, fast = pair(**settings)
    for one, other in zip(*(outcome(m, 5, torch.float32) for m in (fast, plain)), strict=True):
        assert torch.allclose(one, other)


def test_it_keeps_less_than_autograd_would():
    kept = []
    for module in pair():
        sizes: list[int] = []

        def note(tensor: torch.Tensor, sizes=sizes) -> torch.Tensor:
            sizes.append(tensor.numel() * (tensor.shape[-1] == 56 and len(tensor) == 100))
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            module(torch.randn(100, 32, requires_grad=True))
        kept.append(sum(sizes))
    assert kept[1] == 2 * 100 * 56 < kept[0]


def test_a_second_backward_pass_is_refused():
    _, fast = pair()
    out = fast(torch.randn(5, 32, requires_grad=True)).sum()
    out.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()
