"""Products by either library equal each other, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from peagle.kernels.cpu.backend import Cpu
from peagle.kernels.cpu.products import FEW, add_product, product, without_gaps
from peagle.kernels.linear import linear, weight_gradient
from peagle.kernels.precision import at_least_float32


@pytest.mark.parametrize("rows", [0, 1, FEW - 1, FEW, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_linear_layer_and_its_gradients_equal_those_of_torch(rows, dtype):
    x = torch.randn(rows, 48, dtype=dtype, requires_grad=True)
    weight = torch.randn(32, 48, dtype=dtype, requires_grad=True)
    onward = torch.randn(rows, 32, dtype=dtype)
    ours, theirs = linear(x, weight, Cpu()), F.linear(x, weight)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), onward),
        torch.autograd.grad(theirs, (x, weight), onward),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-3)


def test_a_bias_is_added():
    x, weight, bias = torch.randn(70, 8), torch.randn(5, 8), torch.randn(5)
    assert torch.allclose(Cpu().linear(x, weight, bias), F.linear(x, weight, bias), atol=1e-5)


def test_a_transposed_weight_needs_no_copy():
    x, weight = torch.randn(300, 32), torch.randn(32, 48)
    assert torch.allclose(product(x, weight.T), x @ weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("out", "inside"), [(200, 40), (40, 200), (5, 300), (300, 5)])
@pytest.mark.parametrize("rows", [0, 1, 70])
def test_a_gradient_is_added_whichever_side_is_wider(rows, out, inside, dtype):
    a, b = torch.randn(rows, out).to(dtype).T, torch.randn(rows, inside).to(dtype)
    near = 2e-2 if dtype == torch.bfloat16 else 1e-5
    total = torch.randn(out, inside).to(at_least_float32(dtype))
    wanted = total.double() + a.double() @ b.double()
    add_product(total, a, b)
    assert (total - wanted).norm() < near * wanted.norm()
    alone = weight_gradient(Cpu(), None, a, b)
    assert alone.dtype == a.dtype and alone.is_contiguous()
    assert torch.allclose(alone.double(), a.double() @ b.double(), rtol=near, atol=near * rows)


def test_a_weight_with_gaps_is_copied_in_its_own_order():
    whole = torch.randn(64, 96)
    for weight in (whole, whole.T):
        assert without_gaps(weight).data_ptr() == weight.data_ptr()
    for weight in (whole[:, 8:40], whole[:, 8:40].T):
        copy = without_gaps(weight)
        assert torch.equal(copy, weight) and (copy.stride(0) == 1) == (weight.stride(0) == 1)
        assert copy.is_contiguous() or copy.T.is_contiguous()
        x = torch.randn(FEW, weight.shape[1])
        assert torch.allclose(product(x, weight), x @ weight.T, rtol=1e-5, atol=1e-4)


def test_autocast_decides_the_precision_as_it_does_for_torch():
    x, weight = torch.randn(300, 48), torch.randn(32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Cpu().linear(x, weight), F.linear(x, weight))
        assert Cpu().linear(x, weight).dtype == torch.bfloat16
