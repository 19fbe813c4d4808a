"""The Triton form of the loss without a GPU: run by Triton's interpreter, and compiled for one.

A loss is one entry of a table, so a loss of which the kernels have never heard is tested with those
that are there.
"""

import os
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from loss_mixes import MIXES

from peagle.kernels.cpu.backend import Cpu
from peagle.kernels.reference import Reference
from peagle.train import loss as plain
from peagle.train.loss import LOSSES, Loss, head_loss

pytest.importorskip("triton")  # conftest.py asks for its interpreter


def log_of_mean(x):
    return torch.log(torch.where(x.p + x.q > 0, (x.p + x.q) / 2, 1.0))


def jensen_shannon(x):
    return (x.p * x.log_p + x.q * x.log_q) / 2 - (x.p + x.q) / 2 * log_of_mean(x)


def jensen_shannon_slope(x):
    return x.q * (x.log_q - log_of_mean(x)) / 2


NEW = {"js": Loss(jensen_shannon, jensen_shannon_slope)}
ALL = [*MIXES, {"js": 1.0}]


@pytest.fixture
def interpreted(monkeypatch):
    """A backend whose loss is that of CUDA, in blocks smaller than the vocabulary."""
    from peagle.kernels.cuda import loss as kernels

    monkeypatch.setattr(torch.cuda, "device_of", nullcontext)
    for name in ("KNOWN_SHAPE", "ROWS_SHAPE"):
        monkeypatch.setattr(kernels, name, {"block": 32})
    monkeypatch.setattr(plain, "LOSSES", LOSSES | NEW)
    monkeypatch.setattr(Reference, "head_chunk", 4)

    class Interpreted(Reference):
        def fused_loss(self, dtype):
            return kernels.known, kernels.finish

    return Interpreted()


@pytest.mark.parametrize("mix", ALL, ids="+".join)
@pytest.mark.parametrize(("dtype", "weighted"), [(torch.float32, True), (torch.bfloat16, False)])
def test_every_loss_by_triton_is_that_of_float64(mix, weighted, dtype, interpreted):
    hidden, weight, target = (torch.randn(n, w).to(dtype) for n, w in ((6, 8), (40, 8), (3, 40)))
    target[0] = torch.linspace(-60, 60, 40)  # rises from block to block, and underflows
    position, weights = torch.tensor([0, 1, 2, 0, 1, 0]), torch.rand(6) if weighted else None

    def found(precision, ops):
        leaves = [x.to(precision).requires_grad_() for x in (hidden, weight)]
        share = None if weights is None else weights.to(precision)
        args = (*leaves, target.to(precision), position)
        loss, guess = head_loss(*args, mix=mix, weights=share, ops=ops)
        return loss.item(), guess, torch.autograd.grad(loss, leaves)

    wanted, guess, grads = found(torch.float64, Cpu())
    got, got_guess, got_grads = found(dtype, interpreted)
    near = 1e-5 if dtype == torch.float32 else 2e-2
    assert got == pytest.approx(wanted, rel=near, abs=near)
    assert torch.equal(got_guess, guess) or dtype == torch.bfloat16
    for one, other in zip(got_grads, grads, strict=True):
        assert (one - other).norm() <= near * other.norm()


COMPILE = """
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

class Gpu:
    get_current_target = lambda self: GPUTarget("cuda", 90, 32)
    get_current_device = get_current_stream = lambda self, *_: 0

driver.set_active(Gpu())
from peagle.kernels.cuda import loss
from peagle.train.loss import LOSSES

logits, numbers, places = torch.zeros(4, 5000), torch.zeros(4), torch.zeros(4, dtype=torch.int64)
known = (numbers, numbers, places)
values, slopes = (tuple(loss.for_triton(x[n]) for x in LOSSES.values()) for n in (0, 1))
shares = (0.5,) * len(LOSSES)
loss._known.warmup(logits, *known, 5000, grid=(4,), **loss.KNOWN_SHAPE)
loss._finish.warmup(
    logits, logits, *known, places, numbers, numbers, places, 5000, 5000, values, slopes, shares,
    with_grad=True, grid=(4,), **loss.ROWS_SHAPE,
)
"""


def test_the_kernels_compile_for_a_gpu(tmp_path):
    """The interpreter runs what the compiler would refuse. ``warmup`` compiles without a GPU."""
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE], env=env, check=True, timeout=200)
    assert list(tmp_path.rglob("_finish.cubin"))
