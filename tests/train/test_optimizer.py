import pytest
import torch
from torch.optim import AdamW, Muon

from peagle.train.optimizer import MATRICES, MuonAdamW


def parameters():
    generator = torch.Generator().manual_seed(0)
    shapes = [(6, 4), (4, 4), (10, 4), (4,)]
    return [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]


def groups(ps):
    return [{"params": ps[:2], MATRICES: True}, {"params": ps[2:], MATRICES: False}]


def gradients(ps, step):
    generator = torch.Generator().manual_seed(step)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=generator)


def test_each_group_moves_as_under_its_own_optimizer(monkeypatch):
    monkeypatch.setattr("peagle.kernels.cpu.products.FAST_BF16", True)
    ours, alone = parameters(), parameters()
    both = MuonAdamW(groups(ours), lr=0.01)
    parts = [
        Muon(alone[:2], lr=0.01, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        AdamW(alone[2:], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    for step in range(3):
        gradients(ours, step)
        gradients(alone, step)
        both.step()
        for part in parts:
            part.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, alone, strict=True))


def test_muon_computes_in_float32_where_bf16_is_slow(monkeypatch):
    """A gradient's singular values follow the iteration's polynomial, which bf16 blurs."""
    monkeypatch.setattr("peagle.kernels.cpu.products.FAST_BF16", False)
    moved = torch.nn.Parameter(torch.zeros(4, 4))
    both = MuonAdamW([{"params": [moved], MATRICES: True}, {"params": parameters()[3:]}], lr=1.0)
    moved.grad = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0]))
    both.step()
    x = moved.grad.diagonal().double() / moved.grad.norm()
    for _ in range(5):
        x = 3.4445 * x - 4.775 * x**3 + 2.0315 * x**5
    assert torch.allclose(-moved.diagonal().double() / (0.2 * 4**0.5), x, atol=1e-4)


def test_a_schedule_reaches_both_groups():
    ours = parameters()
    both = MuonAdamW(groups(ours), lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(both, lambda _: 0.0)
    before = [p.detach().clone() for p in ours]
    gradients(ours, 0)
    both.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, before, strict=True))


@pytest.mark.parametrize("steps", [1, 4])
def test_a_restored_state_goes_on_bit_for_bit(steps):
    straight = parameters()
    whole = MuonAdamW(groups(straight), lr=0.01)
    for step in range(6):
        gradients(straight, step)
        whole.step()
    broken = parameters()
    first = MuonAdamW(groups(broken), lr=0.01)
    for step in range(steps):
        gradients(broken, step)
        first.step()
    second = MuonAdamW(groups(broken), lr=0.5)
    second.load_state_dict(first.state_dict())
    for step in range(steps, 6):
        gradients(broken, step)
        second.step()
    assert all(torch.equal(a, b) for a, b in zip(straight, broken, strict=True))
