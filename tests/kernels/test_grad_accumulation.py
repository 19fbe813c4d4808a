"""Accumulated gradients of pieces against one ordinary backward pass."""

import pytest
import torch
from transformers import LlamaConfig

from peagle.kernels.cpu import products
from peagle.kernels.cpu.backend import Cpu
from peagle.kernels.cpu.products import add_product
from peagle.kernels.grad_accumulation import MainGrads, accumulate
from peagle.kernels.reference import Reference
from peagle.model.layers import FeedForward
from peagle.train.loss import head_loss

BACKENDS = pytest.mark.parametrize("backend", [Reference, Cpu])
NONE = MainGrads(())


def pieces_of(backend, count=3, dtype=torch.float64):
    """Pieces that use one weight in a product and by itself, and what all of them read."""
    draw = torch.Generator().manual_seed(count)
    weight, vector, *inputs = (
        torch.randn(*shape, generator=draw, dtype=dtype)
        for shape in [(6, 4), (4,), *[(5, 4)] * count]
    )
    weight.requires_grad_(), vector.requires_grad_()

    def piece(x):
        def run(shared, main_grads):
            out = backend(main_grads).linear(x * shared[0], weight)
            return out.tanh().sum().float() + 0.3 * weight.square().sum()

        return run

    return weight, vector, [piece(x) for x in inputs]


@BACKENDS
def test_gradients_by_products_and_by_autograd_come_together(backend):
    weight, vector, pieces = pieces_of(backend)
    plain = sum(piece((vector,), NONE) for piece in pieces)
    wanted = torch.autograd.grad(plain, (weight, vector), torch.tensor(0.7))
    total = accumulate(pieces, (vector,), [weight])
    got = torch.autograd.grad(total, (weight, vector), torch.tensor(0.7))
    assert total.item() == pytest.approx(plain.item(), rel=1e-6)
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_weight_is_cast_once_for_all_pieces():
    weight, vector, pieces = pieces_of(Cpu, dtype=torch.float32)
    casts = []

    def noting(piece):
        def run(shared, main_grads):
            casts.append(main_grads.cast(weight, torch.bfloat16))
            return piece(shared, main_grads)

        return run

    with torch.autocast("cpu", torch.bfloat16):
        total = accumulate([noting(piece) for piece in pieces], (vector,), [weight])
    assert len(casts) == 3 and all(one is casts[0] for one in casts)
    assert casts[0].dtype == torch.bfloat16
    (found,) = torch.autograd.grad(total, weight)
    assert found.dtype == torch.float32 and found.any()


def test_a_weight_is_cast_to_the_precision_that_is_asked_for():
    weight = torch.randn(6, 4, requires_grad=True)
    grads = MainGrads([weight])
    kinds = (torch.bfloat16, torch.float32, torch.bfloat16)
    assert [grads.cast(weight, dtype).dtype for dtype in kinds] == list(kinds)


@BACKENDS
def test_sums_of_many_rounded_gradients_are_kept_in_the_precision_of_the_weight(backend):
    weight = torch.zeros(3, 2, requires_grad=True)
    x = torch.full((1, 2), 1 + 2**-7)
    ones = torch.ones(1, requires_grad=True)

    def piece(shared, main_grads):
        return backend(main_grads).linear(x, weight).float().sum() + 0 * shared[0].sum()

    with torch.autocast("cpu", torch.bfloat16):
        (found,) = torch.autograd.grad(accumulate([piece] * 1000, (ones,), [weight]), weight)
    assert torch.equal(found, torch.full((3, 2), 1000 * (1 + 2**-7)))


def test_sums_for_what_is_shared_in_bf16_are_rounded_once():
    vector = torch.ones(2, dtype=torch.bfloat16, requires_grad=True)
    pieces = [lambda shared, _: (shared[0] * (1 + 2**-7)).sum().float()] * 1000
    (found,) = torch.autograd.grad(accumulate(pieces, (vector,), []), vector)
    assert torch.equal(found, torch.full((2,), 1000 * (1 + 2**-7)).bfloat16())


def test_pieces_are_differentiated_outside_autocast():
    vector, seen = torch.ones(3, requires_grad=True), []

    def piece(shared, _):
        out = 2 * shared[0]
        out.register_hook(lambda _: seen.append(torch.is_autocast_enabled("cpu")))
        return out.sum()

    with torch.autocast("cpu", torch.bfloat16):
        accumulate([piece], (vector,), [])
        assert torch.is_autocast_enabled("cpu")
    assert seen == [False]


def test_a_piece_that_fails_leaves_the_weights_as_they_were():
    weight, vector, pieces = pieces_of(Cpu)

    def fails(*_):
        raise RuntimeError("as it is meant to")

    with pytest.raises(RuntimeError, match="as it is meant to"):
        accumulate([*pieces, fails], (vector,), [weight])
    (found,) = torch.autograd.grad(weight.sum(), weight)
    assert torch.equal(found, torch.ones_like(weight))


def head():
    states, weight, target = torch.randn(5, 4), torch.randn(7, 4), torch.randn(5, 7)
    return states.requires_grad_(), weight.requires_grad_(), target


def loss_of(states, weight, target, main_grads):
    mix, ops = {"kl": 1.0}, Cpu(main_grads)
    return head_loss(states, weight, target, torch.arange(5), mix=mix, ops=ops)[0]


def test_the_loss_of_a_piece_must_not_be_rescaled():
    states, weight, target = head()

    def piece(factor):
        return lambda shared, grads: factor * loss_of(shared[0], weight, target, grads)

    accumulate([piece(1)], (states,), [weight])
    with pytest.raises(RuntimeError, match="scale the sum of the pieces, not a piece"):
        accumulate([piece(2)], (states,), [weight])


def test_a_loss_without_gradients_accumulates_none():
    states, weight, target = head()

    def loss(shared, main_grads):
        return loss_of(shared[0], weight, target, main_grads)

    def looking_first(shared, main_grads):
        with torch.no_grad():
            loss(shared, main_grads)
        return loss(shared, main_grads)

    wanted, got = (
        torch.autograd.grad(accumulate([piece], (states,), [weight]), weight)[0]
        for piece in (loss, looking_first)
    )
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, 10])
@pytest.mark.parametrize("width", [3, 12])  # less and more than rows
def test_a_product_is_added_block_by_block(dtype, rows, width, monkeypatch):
    for name, value in (("BLOCK_ROWS", 4), ("BLOCK_ELEMENTS", 1)):
        monkeypatch.setattr(products, name, value)
    a, b = torch.randn(6, rows).to(dtype).T, torch.randn(6, width).to(dtype)
    before = torch.randn(rows, width)
    total = before.clone()
    add_product(total, a, b)
    wanted = before.double() + a.double() @ b.double()
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert (total - wanted).norm() < near * wanted.norm()


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pieces_without_rows_add_nothing(dtype, backend):
    weight = torch.randn(64, 48, dtype=dtype, requires_grad=True)
    x = torch.zeros(0, 48, dtype=dtype, requires_grad=True)

    def piece(shared, main_grads):
        return backend(main_grads).linear(shared[0], weight).sum()

    (found,) = torch.autograd.grad(accumulate([piece] * 2, (x,), [weight]), weight)
    assert found.shape == weight.shape and not found.any()


@pytest.mark.parametrize("frozen", ["gate_proj", "up_proj", "down_proj"])
def test_weights_that_are_frozen_take_part_without_a_gradient(frozen):
    torch.manual_seed(0)
    module = FeedForward(LlamaConfig(hidden_size=32, intermediate_size=12)).double()
    getattr(module, frozen).requires_grad_(False)
    weights = [p for p in module.parameters() if p.requires_grad]
    x = torch.randn(5, 32, dtype=torch.float64, requires_grad=True)

    def piece(by):
        return lambda shared, grads: module(by * shared[0], Cpu(grads)).sum().float()

    pieces = [piece(1), piece(2)]
    wanted = torch.autograd.grad(sum(each((x,), NONE) for each in pieces), [x, *weights])
    got = torch.autograd.grad(accumulate(pieces, (x,), weights), [x, *weights])
    assert len(weights) == 2
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_a_forgotten_precision_is_not_hidden():
    x, weight = torch.randn(5, 4).bfloat16(), torch.randn(6, 4, requires_grad=True)
    vector = torch.ones(4, requires_grad=True)

    def piece(shared, main_grads):
        return Cpu(main_grads).linear(x, weight).sum() + shared[0].sum()

    with pytest.raises(RuntimeError, match="same dtype"):
        accumulate([piece], (vector,), [weight])
