"""What the parts of a held sum share, against one ordinary backward pass."""

import pytest
import torch
from transformers import LlamaConfig

from peagle.kernels.cpu import onednn
from peagle.kernels.cpu.onednn import add_product
from peagle.kernels.feed_forward import FeedForward
from peagle.kernels.grad_accumulation import factor_of, held_of, held_sum
from peagle.kernels.products import product
from peagle.train.loss import head_loss


def weighty(parts=3, dtype=torch.float64):
    """Parts that use one weight in a product and by itself, and what all of them read."""
    draw = torch.Generator().manual_seed(parts)
    weight, vector, *inputs = (
        torch.randn(*shape, generator=draw, dtype=dtype)
        for shape in [(6, 4), (4,), *[(5, 4)] * parts]
    )
    weight.requires_grad_(), vector.requires_grad_()

    def part(x):
        return lambda shared: (
            product(x * shared[0], weight).tanh().sum().float() + 0.3 * weight.square().sum()
        )

    return weight, vector, [part(x) for x in inputs]


def test_gradients_by_products_and_by_autograd_come_together():
    weight, vector, parts = weighty()
    plain = sum(part((vector,)) for part in parts)
    wanted = torch.autograd.grad(plain, (weight, vector), torch.tensor(0.7))
    total = held_sum(parts, (vector,), [weight])
    got = torch.autograd.grad(total, (weight, vector), torch.tensor(0.7))
    assert total.item() == pytest.approx(plain.item(), rel=1e-6)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_weight_is_prepared_once_for_all_parts_and_released_after_them():
    weight, vector, parts = weighty(dtype=torch.float32)
    factors = []

    def noting(part):
        def run(shared):
            factors.append(factor_of(weight, torch.bfloat16))
            return part(shared)

        return run

    with torch.autocast("cpu", torch.bfloat16):
        total = held_sum([noting(part) for part in parts], (vector,), [weight])
    assert len(factors) == 3 and all(one is factors[0] for one in factors)
    assert factor_of(weight, torch.bfloat16) is not factors[0]
    assert held_of(weight) is None
    (found,) = torch.autograd.grad(total, weight)
    assert found.dtype == torch.float32 and found.any()


def test_what_is_held_serves_the_precision_that_is_asked_for():
    weight, seen = torch.randn(6, 4, requires_grad=True), []

    def part(shared):
        seen.extend(factor_of(weight, dtype).dtype for dtype in (torch.bfloat16, torch.float32))
        return shared[0].sum()

    held_sum([part], (torch.ones(1, requires_grad=True),), [weight])
    assert seen == [torch.bfloat16, torch.float32]


def test_sums_of_many_rounded_gradients_are_kept_in_the_precision_of_the_weight():
    weight = torch.zeros(3, 2, requires_grad=True)
    x = torch.full((1, 2), 1 + 2**-7)
    ones = torch.ones(1, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        parts = [lambda shared: product(x, weight).float().sum() + 0 * shared[0].sum()] * 1000
        (found,) = torch.autograd.grad(held_sum(parts, (ones,), [weight]), weight)
    assert torch.equal(found, torch.full((3, 2), 1000 * (1 + 2**-7)))


def test_sums_for_what_is_shared_in_bf16_are_rounded_once():
    vector = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    parts = [lambda shared: (shared[0] * (1 + 2**-7)).sum().float()] * 1000
    (found,) = torch.autograd.grad(held_sum(parts, (vector,), []), vector)
    assert torch.equal(found, torch.full((2,), 1000 * (1 + 2**-7)).bfloat16())


def test_parts_are_differentiated_outside_autocast():
    vector, seen = torch.ones(3, requires_grad=True), []

    def part(shared):
        out = 2 * shared[0]
        out.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        return out.sum()

    with torch.autocast("cpu", torch.bfloat16):
        held_sum([part], (vector,), [])
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_a_part_that_fails_leaves_nothing_held():
    weight, vector, parts = weighty()

    def fails(_):
        raise RuntimeError("as it is meant to")

    with pytest.raises(RuntimeError, match="as it is meant to"):
        held_sum([*parts, fails], (vector,), [weight])
    assert held_of(weight) is None
    (found,) = torch.autograd.grad(weight.sum(), weight)
    assert torch.equal(found, torch.ones_like(weight))


def test_a_part_must_not_scale_the_loss_of_the_head():
    states, weight, teacher = torch.randn(5, 4), torch.randn(7, 4), torch.randn(5, 7)
    states.requires_grad_(), weight.requires_grad_()

    def part(factor):
        def run(shared):
            loss, _ = head_loss(shared[0], weight, teacher, torch.arange(5), mix={"kl": 1.0})
            return factor * loss

        return run

    held_sum([part(1)], (states,), [weight])
    with pytest.raises(RuntimeError, match="scale a held sum, not its parts"):
        held_sum([part(2)], (states,), [weight])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 10])
@pytest.mark.parametrize("width", [3, 12])  # less and more than rows
def test_a_product_is_added_block_by_block(dtype, rows, width, monkeypatch):
    monkeypatch.setattr(onednn, "SLOW_MKL", True)  # MKL would add it at once
    monkeypatch.setattr(onednn, "FEW", 1)
    monkeypatch.setattr(onednn, "BLOCK_ROWS", 4)
    monkeypatch.setattr(onednn, "BLOCK_ELEMENTS", 1)
    a, b = torch.randn(6, rows).to(dtype).T, torch.randn(6, width).to(dtype)
    before = torch.randn(rows, width)
    total = before.clone()
    add_product(total, a, b)
    wanted = before.double() + a.double() @ b.double()
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert (total - wanted).norm() < near * wanted.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parts_without_rows_add_nothing(dtype):
    weight = torch.randn(64, 48, dtype=dtype, requires_grad=True)
    x = torch.zeros(0, 48, dtype=dtype, requires_grad=True)
    total = held_sum([lambda shared: product(shared[0], weight).sum()] * 2, (x,), [weight])
    (found,) = torch.autograd.grad(total, weight)
    assert found.shape == weight.shape and not found.any()


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj"])
def test_weights_that_are_frozen_take_part_without_being_held(frozen):
    torch.manual_seed(0)
    module = FeedForward(LlamaConfig(hidden_size=32, intermediate_size=12)).double()
    getattr(module, frozen).requires_grad_(False)
    weights = [p for p in module.parameters() if p.requires_grad]
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)
    parts = [lambda shared, by=by: module(by * shared[0]).sum().float() for by in (1, 2)]
    wanted = torch.autograd.grad(sum(part((x,)) for part in parts), [x, *weights])
    got = torch.autograd.grad(held_sum(parts, (x,), weights), [x, *weights])
    assert len(weights) == 2
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_loss_without_gradients_adds_none_to_what_is_held():
    states, weight, teacher = torch.randn(5, 4), torch.randn(7, 4), torch.randn(5, 7)
    states.requires_grad_(), weight.requires_grad_()

    def loss(shared):
        return head_loss(shared[0], weight, teacher, torch.arange(5), mix={"kl": 1.0})[0]

    def looking_first(shared):
        with torch.no_grad():
            loss(shared)
        return loss(shared)

    wanted, got = (
        torch.autograd.grad(held_sum([part], (states,), [weight]), weight)[0]
        for part in (loss, looking_first)
    )
    assert torch.equal(got, wanted)


def test_what_is_held_is_no_excuse_for_a_forgotten_precision():
    x, weight = torch.randn(5, 4).bfloat16(), torch.randn(6, 4, requires_grad=True)
    vector = torch.ones(4, requires_grad=True)

    def part(shared):
        return product(x, weight).sum() + shared[0].sum()

    with pytest.raises(RuntimeError, match="same dtype"):
        held_sum([part], (vector,), [weight])
