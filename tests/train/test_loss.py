import math

import pytest
import torch
from loss_mixes import MIXES

from peagle.kernels.cpu.backend import Cpu
from peagle.kernels.cpu.products import ROW_UNIT
from peagle.kernels.reference import Reference
from peagle.train.loss import check_mix, head_loss

OPS = Cpu()


def reference(hidden, weight, target, position, mix, weights):
    """The definitions of the module's docstring, row by row, by autograd."""
    total = hidden.new_zeros(())
    for state, line, share_of_row in zip(hidden, position.tolist(), weights, strict=True):
        p = torch.softmax(target[line], -1)
        q = torch.softmax(weight @ state, -1)
        alpha = torch.minimum(p, q).sum()
        kl = torch.sum(p * torch.log(p / q))
        blend = math.exp(-3 * float(alpha.detach()))
        values = {
            "kl": kl,
            "tv": 1 - alpha,
            "ce": -torch.log(q[p.argmax()]),
            "lk_hybrid": blend * kl + (1 - blend) * (1 - alpha),
        }
        row = sum(share * values[name] for name, share in mix.items())
        total = total + share_of_row * row
    return total


def inputs(rows=37, width=8, vocabulary=23, positions=11):
    hidden = torch.randn(rows, width, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=torch.float64, requires_grad=True)
    target = 2 * torch.randn(positions, vocabulary, dtype=torch.float64)
    return hidden, weight, target, torch.randint(0, positions, (rows,))


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weighted rows"])
@pytest.mark.parametrize("mix", MIXES, ids=lambda m: "+".join(m))
@pytest.mark.parametrize("backend", [Reference, Cpu])
def test_values_and_gradients_equal_the_plain_definition(mix, weighted, backend, monkeypatch):
    monkeypatch.setattr(Reference, "head_chunk", 10)
    monkeypatch.setattr("peagle.kernels.cpu.backend.CACHE_BYTES", 4 * 4 * 23)  # four rows
    hidden, weight, target, position = inputs()
    weights = torch.rand(37, dtype=torch.float64) + 0.1 if weighted else None
    expected = reference(
        hidden, weight, target, position, mix, torch.ones(37) if weights is None else weights
    )
    wanted = torch.autograd.grad(3 * expected, (hidden, weight))
    loss, _ = head_loss(hidden, weight, target, position, mix=mix, weights=weights, ops=backend())
    got = torch.autograd.grad(3 * loss, (hidden, weight))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for ours, theirs in zip(got, wanted, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.fixture
def unwritten_is_nan():
    """Memory that nothing was written to is not zero by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("rows", [0, 7, 37])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_no_gradient_is_left_unwritten(rows, dtype, unwritten_is_nan, monkeypatch):
    monkeypatch.setattr(Reference, "head_chunk", 10)
    hidden, weight, target, position = inputs(rows)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        loss, _ = head_loss(hidden, weight, target, position, mix={"kl": 1.0}, ops=OPS)
    for found in torch.autograd.grad(loss, (hidden, weight)):
        assert found.isfinite().all() and found.any() == (rows > 0)


@pytest.mark.parametrize("scale", [1, 3])
def test_a_second_backward_pass_is_refused(scale):
    hidden, weight, target, position = inputs()
    loss, _ = head_loss(hidden, weight, target, position, mix={"kl": 1.0}, ops=OPS)
    torch.autograd.grad(scale * loss, (hidden, weight), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(3 * loss, (hidden, weight))


def test_every_loss_is_zero_for_a_perfect_drafter_except_cross_entropy():
    _, weight, _, position = inputs()
    states = torch.randn(11, 8, dtype=torch.float64)
    target = states @ weight.detach().T
    for name in ("kl", "tv", "lk_hybrid"):
        loss, guess = head_loss(
            states[position], weight, target, position, mix={name: 1.0}, ops=OPS
        )
        assert loss.item() == pytest.approx(0, abs=1e-9)
        assert torch.equal(guess, target[position].argmax(-1))


def test_bf16_autocast_stays_near_the_float64_gradient():
    hidden, weight, target, position = (t.detach() for t in inputs(rows=300, width=64))
    exact = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    loss, _ = head_loss(*exact, target, position, mix={"kl": 1.0}, ops=OPS)
    wanted = torch.autograd.grad(loss, exact)
    rough = [hidden.float().requires_grad_(), weight.float().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = head_loss(*rough, target.float(), position, mix={"kl": 1.0}, ops=OPS)
    for ours, theirs in zip(torch.autograd.grad(loss, rough), wanted, strict=True):
        assert ours.dtype == torch.float32
        assert (ours.double() - theirs).norm() < 0.02 * theirs.norm()


def test_products_with_the_head_have_whole_units_of_rows(monkeypatch):
    monkeypatch.setattr(Reference, "head_chunk", 2 * ROW_UNIT)
    asked = []

    class Noting(Cpu):
        def product(self, x, weight):
            asked.append(len(x))
            return super().product(x, weight)

    hidden, weight, target, position = inputs(rows=5 * ROW_UNIT - 7)
    head_loss(hidden, weight, target, position, mix={"kl": 1.0}, ops=Noting())
    assert asked == [2 * ROW_UNIT] * 4 + [ROW_UNIT] * 2  # forward and back


def test_without_gradients_nothing_is_kept():
    hidden, weight, target, position = inputs()
    with torch.no_grad():
        loss, _ = head_loss(hidden, weight, target, position, mix={"kl": 1.0}, ops=OPS)
    assert not loss.requires_grad


def test_the_target_is_asked_once_per_position_and_for_one_chunk_at_a_time(monkeypatch):
    monkeypatch.setattr(Reference, "head_chunk", 10)
    hidden, weight, target, _ = inputs(rows=40)
    position = torch.arange(40).flip(0) // 5  # 5 rows for each of 8 positions: 2 in a chunk
    asked = []

    class Listening:
        def __getitem__(self, positions):
            asked.append(positions.tolist())
            return target[positions]

    head_loss(hidden, weight, Listening(), position, mix={"kl": 1.0}, ops=OPS)
    assert asked == [[0, 1], [2, 3], [4, 5], [6, 7]]


@pytest.mark.parametrize("width", [1, 100, 128, 129, 1000])
def test_the_first_choice_is_the_largest_logit(width):
    logits = torch.randn(200, width)
    logits[:100] = torch.randint(0, 3, (100, width)).float()  # ties
    rows = torch.arange(200)
    found = Cpu().first_choice(logits)
    assert torch.equal(logits[rows, found], logits.amax(-1))
    assert torch.equal(found[100:], logits[100:].argmax(-1))


@pytest.mark.parametrize("mix", [{}, {"kl": 0.0}, {"kl": -1.0}, {"mse": 1.0}])
def test_a_mix_that_means_nothing_is_refused(mix):
    with pytest.raises(ValueError):
        check_mix(mix)


def test_autocast_rounds_the_logits_and_nothing_after_them():
    draw = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(60, 32, generator=draw), torch.randn(500, 32, generator=draw) / 6
    target, position = 2 * torch.randn(60, 500, generator=draw), torch.arange(60)
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = head_loss(hidden, weight, target, position, mix={"kl": 1.0}, ops=OPS)
        logits = hidden @ weight.T
    p, q = torch.softmax(target.double(), -1), torch.log_softmax(logits.double(), -1)
    assert found.item() == pytest.approx((p * (p.log() - q)).sum().item(), rel=1e-5)
