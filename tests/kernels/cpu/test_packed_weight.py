"""Products with a weight that was laid out for them equal those of torch, forward and back."""

import pytest
import torch
from transformers import LlamaConfig

from peagle.kernels.cpu import packed_weight as module
from peagle.kernels.cpu.packed_weight import Weight
from peagle.kernels.feed_forward import FeedForward
from peagle.kernels.grad_accumulation import held_sum
from peagle.kernels.products import product
from peagle.train.loss import head_loss

EVERY = (torch.float32, torch.bfloat16, torch.float64, torch.float16)
NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float64: 1e-12, torch.float16: 2e-3}


def near(got, wanted, dtype):
    assert got.dtype == dtype and got.shape == wanted.shape
    return (got.double() - wanted).norm() <= NEAR[dtype] * wanted.norm()


@pytest.mark.parametrize("dtype", EVERY)
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("rows", [0, 1, 31, 300])
@pytest.mark.parametrize(("out", "inside"), [(96, 40), (40, 96), (1, 7)])
def test_products_forth_and_back_are_those_of_torch(out, inside, rows, lasting, dtype):
    weight = torch.randn(out, inside).requires_grad_()
    factor, exact = Weight(weight, dtype, lasting=lasting), weight.detach().to(dtype).double()
    for _ in range(2):  # again with what was laid out
        x, grad = torch.randn(rows, inside).to(dtype), torch.randn(rows, out).to(dtype)
        assert near(factor.product(x), x.double() @ exact.T, dtype)
        assert near(factor.product_back(grad), grad.double() @ exact, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_and_weights_with_gaps_are_read_where_they_are(dtype):
    whole = torch.randn(96, 200)
    for weight in (whole[:, 8:72], whole[:64, :].T, whole[::2, 1::3]):
        factor, exact = Weight(weight, dtype, lasting=True), weight.to(dtype).double()
        x = torch.randn(50, 2 * exact.shape[1]).to(dtype)[:, : exact.shape[1]]
        grad = torch.randn(exact.shape[0], 50).to(dtype).T
        assert near(factor.product(x), x.double() @ exact.T, dtype)
        assert near(factor.product_back(grad), grad.double() @ exact, dtype)


@pytest.fixture
def laid(monkeypatch):
    """Shapes of what is laid out, on any processor."""
    shapes, real = [], module.laid_out
    monkeypatch.setattr(module, "FASTEST", {torch.float32: True})
    monkeypatch.setattr(
        module, "laid_out", lambda weight: shapes.append(tuple(weight.shape)) or real(weight)
    )
    return shapes


@pytest.mark.parametrize("lasting", [False, True])
def test_a_lasting_weight_is_laid_out_once_for_each_direction(lasting, laid):
    factor = Weight(torch.randn(96, 40), torch.float32, lasting=lasting)
    for rows in (100, 1):
        factor.product(torch.randn(rows, 40))
        factor.product_back(torch.randn(rows, 96))
    assert laid == [(96, 40), (40, 96)] * lasting


def test_parts_of_a_held_sum_share_what_was_laid_out(laid):
    module_ = FeedForward(LlamaConfig(hidden_size=32, intermediate_size=12))
    x, weights = torch.randn(40, 32, requires_grad=True), list(module_.parameters())
    held_sum([lambda shared: module_(shared[0]).sum()] * 3, (x,), weights)
    assert sorted(laid) == sorted([(12, 32), (32, 12)] * 3)


def test_chunks_of_a_loss_share_what_was_laid_out(laid, monkeypatch):
    monkeypatch.setattr("peagle.train.loss.CHUNK_ROWS", 64)
    hidden, head = torch.randn(300, 8, requires_grad=True), torch.randn(20, 8)
    head_loss(hidden, head, torch.randn(300, 20), torch.arange(300), mix={"kl": 1.0})
    assert laid == [(20, 8), (8, 20)]


@pytest.mark.parametrize(
    ("of", "bf16"), [("linear", False), ("feed_forward", False), ("feed_forward", True)]
)
def test_a_weight_that_changes_before_the_backward_pass_is_an_error(of, bf16):
    layer = FeedForward(LlamaConfig(hidden_size=32, intermediate_size=12))
    weight = layer.gate_proj.weight
    x = torch.randn(40, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = product(x, weight) if of == "linear" else layer(x)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.float().sum().backward()


def test_a_cast_is_made_once_for_a_lasting_weight_that_cannot_be_laid_out(monkeypatch):
    monkeypatch.setattr(module, "FASTEST", {})
    weight = torch.randn(8, 4)
    kept, made = (Weight(weight, torch.bfloat16, lasting=lasting) for lasting in (True, False))
    assert kept.plain is kept.plain
    assert made.weight.data_ptr() == weight.data_ptr()  # no copy outlives a product
    assert Weight(weight, torch.float32, lasting=True).plain.data_ptr() == weight.data_ptr()
