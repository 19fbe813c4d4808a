"""Attention by products: what they compute, when they give way to the kernel, and whether a whole
attention that uses them stays as close to float64 as its precision allows."""

from collections import Counter
from functools import partial

import pytest
import torch

from peagle.cod.sampling import Cod, Rows, sample_rows
from peagle.kernels.cpu import attention, attention_tiles, gemm_attention
from peagle.kernels.cpu.attention import attend_full, merge, mtp_attention, ntp_attention
from peagle.kernels.cpu.attention_tiles import tile_documents, tile_rollouts

NEAR = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # of the norm of a result
PRECISIONS = pytest.mark.parametrize("dtype", list(NEAR))


def random_heads(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def scores_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query.double() @ key.double().mT * query.shape[-1] ** -0.5


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """What was done in precisions below float64; tiles are small enough for short documents."""
    found: Counter[str] = Counter()

    def count(name):
        function = getattr(attention, name)

        def counted(*args, **kwargs):
            found[name] += args[0].dtype != torch.float64
            return function(*args, **kwargs)

        monkeypatch.setattr(attention, name, counted)

    for name in ("attend_gemm", "attend_gemm_backward", "attend"):
        count(name)
    monkeypatch.setattr(attention, "CAUSAL_SLOTS", 8)
    for name, value in (("DIAGONAL_ROWS", 16), ("DIAGONAL_SLOTS", 4), ("UNIT", 4)):
        monkeypatch.setattr(attention_tiles, name, value)
    return found


@PRECISIONS
@pytest.mark.parametrize("tile", [8, 512])
@pytest.mark.parametrize("gain", [1, 12])  # 12: scores of hundreds
@pytest.mark.parametrize(("shared", "groups", "rows", "slots"), [(1, 1, 1, 5), (2, 3, 21, 30)])
def test_slots_weigh_what_their_scores_exceed_the_lse_by(
    tile, gain, shared, groups, rows, slots, dtype, monkeypatch
):
    monkeypatch.setattr(gemm_attention, "TILE", tile)
    monkeypatch.setattr(gemm_attention, "UNIT", 4)
    query = random_heads(shared, groups, rows, 16, seed=1, dtype=dtype) * gain
    key, value = (random_heads(1, groups, slots, 16, seed=n, dtype=dtype) for n in (2, 3))
    key = key * gain
    lse = torch.linspace(-3, 3, shared * groups * rows).view(shared, groups, rows)
    lse += scores_of(query, key).logsumexp(-1).float()
    weights = (scores_of(query, key) - lse.double()[..., None]).exp()
    near = max(NEAR[dtype], 2 * torch.finfo(torch.float32).eps * lse.abs().max().item())
    found = gemm_attention.attend_gemm(query, key, value, lse)
    assert distance(found[1], weights.sum(-1)) < near
    assert distance(found[0], weights @ value.double()) < near


@PRECISIONS
@pytest.mark.parametrize("tile", [8, 512])
def test_gradients_of_two_halves_are_those_of_the_whole(tile, dtype, monkeypatch):
    monkeypatch.setattr(gemm_attention, "TILE", tile)
    monkeypatch.setattr(gemm_attention, "UNIT", 4)
    query, onward = (random_heads(2, 3, 21, 16, seed=n, dtype=dtype) for n in (1, 2))
    key, value = (random_heads(1, 3, 30, 16, seed=n, dtype=dtype) for n in (3, 4))
    inputs = [x.double().requires_grad_() for x in (query, key, value)]
    scores = scores_of(*inputs[:2])
    out, lse = scores.softmax(-1) @ inputs[2], scores.logsumexp(-1).detach().float()
    wanted = torch.autograd.grad(out, inputs, onward.double())
    halves = [
        gemm_attention.attend_gemm_backward(
            onward, query, key[:, :, half], value[:, :, half], out.detach().float(), lse
        )
        for half in (slice(0, 11), slice(11, 30))
    ]
    for_query, *pairs = zip(*halves, strict=True)
    assert distance(sum(for_query), wanted[0]) < NEAR[dtype]
    for found, want in zip(pairs, wanted[1:], strict=True):
        assert distance(torch.cat(found, 2), want) < NEAR[dtype]


@pytest.mark.parametrize("above", [-200.0, 0.0, 5.0, 20.0, 200.0])
def test_a_tile_far_above_or_below_what_was_seen_before_is_added_all_the_same(above, calls):
    query = random_heads(2, 3, 21, 16, seed=1)
    key, value = (random_heads(1, 3, 30, 16, seed=n) for n in (2, 3))
    scores = scores_of(query, key)
    before = (scores.logsumexp(-1) - above).float()
    total, lse = torch.ones(2, 3, 21, 16), before.clone()
    pairs = (x.expand(2, -1, -1, -1) for x in (key, value))
    merge(total, lse, *attend_full(query, *pairs, lse))
    everything = torch.logaddexp(scores.logsumexp(-1), before.double())
    share = (before.double() - everything).exp()[..., None]
    wanted = share + (scores - everything[..., None]).exp() @ value.double()
    assert total.isfinite().all() and distance(total, wanted) < NEAR[torch.bfloat16]
    assert torch.allclose(lse.double(), everything, rtol=1e-3, atol=1e-2)
    assert calls["attend_gemm"] == 1 and calls["attend"] == (above > 10)


def both(attend, inputs: list[torch.Tensor], dtype: torch.dtype) -> list[float]:
    """Distances from float64: of the result, and of the gradient of each input."""
    found = []
    for precision in (dtype, torch.float64):
        leaves = [x.to(precision).requires_grad_() for x in inputs]
        out = attend(*leaves)
        onward = random_heads(*out.shape, seed=9).to(precision)
        found.append([out, *torch.autograd.grad(out, leaves, onward)])
    return [distance(a.detach(), b.detach()) for a, b in zip(*found, strict=True)]


def assert_one_rule(calls: Counter[str], dtype: torch.dtype, diagonal: int) -> None:
    """Products where queries are bf16 and nothing is masked, else the kernel."""
    assert calls["attend_gemm"] == calls["attend_gemm_backward"]
    if dtype == torch.bfloat16:
        assert calls["attend_gemm"] > 4 and calls["attend"] == diagonal
    else:
        assert calls["attend_gemm"] == 0 and calls["attend"] > 0


@PRECISIONS
def test_ntp_attention_is_that_of_float64(dtype, calls):
    lengths = [50, 7, 33]
    inputs = [random_heads(sum(lengths), heads, 16, seed=heads) for heads in (4, 2, 2)]
    inputs[2] = random_heads(sum(lengths), 2, 16, seed=5)
    near = both(lambda *x: ntp_attention(*x, document_lengths=lengths), inputs, dtype)
    assert max(near) < NEAR[dtype]
    assert_one_rule(calls, dtype, len(tile_documents(lengths, attention.CAUSAL_SLOTS).diagonal))


DOCUMENT = torch.repeat_interleave(torch.arange(3), torch.tensor([50, 7, 33]))


def rollout_rows() -> Rows:
    rows = sample_rows(
        torch.ones(90, dtype=torch.bool),
        DOCUMENT,
        cod=Cod(4, 0.8),
        generator=torch.Generator().manual_seed(0),
    )
    return rows.mtp()


def rollout_inputs(rows: Rows) -> list[torch.Tensor]:
    """Queries, own pairs, pairs of NTP."""
    counts = [(len(rows.anchor), 4), *[(len(rows.anchor), 2)] * 2, *[(90, 2)] * 2]
    return [random_heads(n, heads, 16, seed=i) for i, (n, heads) in enumerate(counts)]


@PRECISIONS
def test_mtp_attention_is_that_of_float64(dtype, calls):
    rows = rollout_rows()
    tiling = tile_rollouts(rows, DOCUMENT)
    attend = partial(mtp_attention, tiling=tiling, main_grads=[None, None])
    assert max(both(attend, rollout_inputs(rows), dtype)) < NEAR[dtype]
    assert_one_rule(calls, dtype, len(tiling.diagonal))


def test_autocast_does_not_round_attention_in_float32():
    rows = rollout_rows()
    inputs = [x.float() for x in rollout_inputs(rows)]
    attend = partial(mtp_attention, *inputs, tile_rollouts(rows, DOCUMENT), [None, None])
    with torch.autocast("cpu", torch.bfloat16):
        found = attend()
    assert torch.equal(found, attend())


@PRECISIONS
def test_no_rows_weigh_nothing(dtype):
    query, key, value = (
        random_heads(1, 3, count, 16, seed=count, dtype=dtype) for count in (0, 40, 40)
    )
    none = torch.zeros(1, 3, 0)
    gained, weight = gemm_attention.attend_gemm(query, key, value, none)
    assert gained.shape == (1, 3, 0, 16) and weight.shape == (1, 3, 0)
    found = gemm_attention.attend_gemm_backward(query, query, key, value, query.float(), none)
    assert [x.shape for x in found] == [query.shape, key.shape, value.shape]
    assert not any(x.any() for x in found)
