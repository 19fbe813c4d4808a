"""Every backend against plain PyTorch in float64: values and gradients, on the same inputs."""

import pytest
import torch
from drawn_rows import drawn

from peagle.kernels.choose import backend_for
from peagle.kernels.cpu.backend import Cpu
from peagle.kernels.cuda.backend import Cuda
from peagle.kernels.reference import Reference

OURS = pytest.mark.parametrize("backend", [Cpu, Cuda])  # Cuda: what also runs elsewhere


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_equal(run, inputs: list[torch.Tensor], ops: Reference) -> None:
    """Result and gradients by ``ops`` are those of the reference."""
    wanted, got = run(Reference(), *inputs), run(ops, *inputs)
    assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-10)
    onward = torch.randn_like(wanted)
    for one, other in zip(
        torch.autograd.grad(got, inputs, onward),
        torch.autograd.grad(wanted, inputs, onward),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@OURS
def test_a_linear_layer(backend):
    inputs = [random(70, 8), random(5, 8), random(5)]
    assert_equal(lambda ops, *x: ops.linear(*x), inputs, backend())


@OURS
def test_an_rms_norm(backend):
    assert_equal(lambda ops, *x: ops.rms_norm(*x, 1e-6), [random(9, 3, 8), random(8)], backend())


@OURS
@pytest.mark.parametrize("rows", [1, 9])  # one row may stand for all
def test_a_rotation(backend, rows):
    angles = (random(9, 1, 4).detach(), random(9, 1, 4).detach())
    assert_equal(lambda ops, x: ops.rotate(x, angles), [random(rows, 4, 8)], backend())


@OURS
def test_a_feed_forward(backend):
    inputs = [random(70, 8), random(12, 8), random(12, 8), random(8, 12)]
    assert_equal(lambda ops, *x: ops.feed_forward(*x), inputs, backend())


@OURS
@pytest.mark.parametrize("lengths", [[40], [300, 7, 1, 41]])
def test_attention_of_ntp(backend, lengths):
    count = sum(lengths)
    inputs = [random(count, heads, 8) for heads in (4, 2, 2)]
    assert_equal(lambda ops, *x: ops.ntp_attention(*x, document_lengths=lengths), inputs, backend())


@pytest.mark.parametrize("lengths", [(40,), (700,), (300, 5, 140, 400)])
def test_attention_of_mtp(lengths):
    """FlexAttention runs on CUDA only: see ``cuda/test_flex_attention.py``."""
    rows, document = drawn(*lengths)
    own, slots = len(rows.anchor), len(document)
    inputs = [
        random(n, heads, 8) for n, heads in ((own, 4), (own, 2), (own, 2), (slots, 2), (slots, 2))
    ]

    def run(ops, *x):
        return ops.mtp_attention(*x, plan=ops.plan_mtp_attention(rows, document, value=x[4]))

    assert_equal(run, inputs, Cpu())


def test_the_head():
    logits = torch.randn(50, 300)
    assert torch.equal(Cpu().first_choice(logits), Reference().first_choice(logits))
    states = torch.randn(50, 8)
    padded = Cpu().pad_rows(states)
    assert len(padded) == 64 and torch.equal(padded[:50], states) and not padded[50:].any()


def test_only_bf16_is_attended_to_in_half_precision(monkeypatch):
    monkeypatch.setattr("peagle.kernels.cpu.backend.FAST_BF16", True)
    asked = {
        (dtype, length): Cpu().attention_dtype(torch.empty(0, 1, dtype=dtype), [3, length])
        for dtype in (torch.bfloat16, torch.float16)
        for length in (100, 2048)
    }
    assert asked.pop((torch.bfloat16, 2048)) == torch.bfloat16
    assert set(asked.values()) == {torch.float32}


def test_the_backend_is_chosen_once_and_may_be_overridden():
    cpu = torch.device("cpu")
    assert type(backend_for(cpu)) is Cpu and backend_for(cpu) is backend_for(cpu)
    assert type(backend_for(cpu, "reference")) is Reference
    assert type(backend_for(torch.device("meta"))) is Reference  # as on MPS, ROCm or XPU
