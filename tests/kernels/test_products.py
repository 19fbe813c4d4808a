"""Products by either library equal each other, values and gradients."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from peagle.kernels import products
from peagle.kernels.cpu import onednn
from peagle.kernels.cpu.onednn import (
    FEW,
    add_product,
    dense,
    plain_product,
    plain_products,
    wide_amd,
)
from peagle.kernels.grad_accumulation import at_least_float, gradient
from peagle.kernels.products import Linear, product, speed_up


@pytest.mark.parametrize("rows", [0, 1, FEW - 1, FEW, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_product_and_its_gradients_equal_those_of_torch(rows, dtype):
    x = torch.randn(rows, 48, dtype=dtype, requires_grad=True)
    weight = torch.randn(32, 48, dtype=dtype, requires_grad=True)
    onward = torch.randn(rows, 32, dtype=dtype)
    ours, theirs = product(x, weight), F.linear(x, weight)
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-4)
    for a, b in zip(
        torch.autograd.grad(ours, (x, weight), onward),
        torch.autograd.grad(theirs, (x, weight), onward),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-3)


def test_a_transposed_weight_needs_no_copy():
    x, weight = torch.randn(300, 32), torch.randn(32, 48)
    assert torch.allclose(plain_product(x, weight.T), x @ weight, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("out", "inside"), [(200, 40), (40, 200), (5, 300), (300, 5)])
@pytest.mark.parametrize("rows", [0, 1, 70])
@pytest.mark.parametrize("slow_mkl", [False, True])
def test_a_gradient_is_added_whichever_side_is_wider(
    slow_mkl, rows, out, inside, dtype, monkeypatch
):
    monkeypatch.setattr(onednn, "SLOW_MKL", slow_mkl)
    a, b = torch.randn(rows, out).to(dtype).T, torch.randn(rows, inside).to(dtype)
    near = 2e-2 if dtype == torch.bfloat16 else 1e-5
    total = torch.randn(out, inside).to(at_least_float(dtype))
    wanted = total.double() + a.double() @ b.double()
    add_product(total, a, b)
    assert (total - wanted).norm() < near * wanted.norm()
    alone = gradient(None, a, b)
    assert alone.dtype == a.dtype and alone.is_contiguous()
    assert torch.allclose(alone.double(), a.double() @ b.double(), rtol=near, atol=near * rows)


def test_amds_processors_with_wide_units_are_known_by_their_family():
    def described(vendor: str, family: int) -> str:
        lines = (
            "processor\t: 0",
            f"vendor_id\t: {vendor}",
            f"cpu family\t: {family}",
            "model\t: 2",
        )
        return "\n".join(lines) + "\n\n"

    assert not wide_amd(described("AuthenticAMD", 25))  # Zen 4 takes two of 256
    assert wide_amd(2 * described("AuthenticAMD", 26))
    assert not wide_amd(described("GenuineIntel", 26))
    assert not wide_amd("Processor\t: AArch64\n")


@pytest.mark.parametrize("slow_mkl", [False, True])
@pytest.mark.parametrize("rows", [0, FEW])
def test_mkl_adds_gradients_of_float32_unless_it_is_slow(slow_mkl, rows, monkeypatch):
    monkeypatch.setattr(onednn, "FAST", True)
    monkeypatch.setattr(onednn, "SLOW_MKL", slow_mkl)
    calls = []
    monkeypatch.setattr(onednn, "plain_product", lambda x, w: calls.append(x) or x @ w.T)
    add_product(torch.zeros(FEW, 48), torch.randn(FEW, rows), torch.randn(rows, 48))
    assert len(calls) == (slow_mkl and rows > 0)


@pytest.mark.parametrize("heads", [1, 3])
def test_products_of_heads_are_those_of_torch(heads):
    a, b = torch.randn(heads, 64, 20), torch.randn(heads, 20, 50)
    assert torch.allclose(plain_products(a, b), a @ b, rtol=1e-5, atol=1e-5)


def test_a_weight_with_gaps_is_copied_in_its_own_order():
    whole = torch.randn(64, 96)
    for weight in (whole, whole.T):
        assert dense(weight).data_ptr() == weight.data_ptr()
    for weight in (whole[:, 8:40], whole[:, 8:40].T):
        copy = dense(weight)
        assert torch.equal(copy, weight) and (copy.stride(0) == 1) == (weight.stride(0) == 1)
        assert copy.is_contiguous() or copy.T.is_contiguous()
        x = torch.randn(FEW, weight.shape[1])
        assert torch.allclose(plain_product(x, weight), x @ weight.T, rtol=1e-5, atol=1e-4)


def test_autocast_decides_the_precision_as_it_does_for_torch():
    x, weight = torch.randn(300, 48), torch.randn(32, 48)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(product(x, weight), F.linear(x, weight))
        assert product(x, weight).dtype == torch.bfloat16


def test_all_linear_layers_of_a_module_are_replaced_and_keep_their_weights(monkeypatch):
    module = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4, bias=False)))
    x, names = torch.randn(200, 8), list(module.state_dict())
    before = module(x)
    speed_up(module)
    calls = []
    monkeypatch.setattr(products, "product", lambda *a: calls.append(a) or F.linear(*a))
    after = module(x)
    assert len(calls) == 2 and list(module.state_dict()) == names
    assert all(type(layer) is Linear for layer in module.modules() if isinstance(layer, nn.Linear))
    assert torch.allclose(after, before, rtol=1e-5, atol=1e-5)
