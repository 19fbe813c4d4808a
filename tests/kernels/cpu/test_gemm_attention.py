"""Attention by products: what they compute, when they give way to the kernel, and whether a whole
attention that uses them stays as close to float64 as its precision allows."""

from collections import Counter
from functools import partial

import pytest
import torch

from peagle.cod.sampling import Cod, Rows, sample_rows
from peagle.kernels.cpu import attention as flash
from peagle.kernels.cpu import attention_tiles as attention_plan
from peagle.kernels.cpu import flash_kernel as kernel
from peagle.kernels.cpu import gemm_attention as unmasked
from peagle.kernels.cpu import onednn
from peagle.kernels.cpu import shared_attention as seen
from peagle.kernels.cpu.attention import flash_causal_attention, flash_rollout_attention, merge
from peagle.kernels.cpu.attention_tiles import places

NEAR = {torch.bfloat16: 2e-2, torch.float32: 1e-5}  # of the norm of a result
PRECISIONS = pytest.mark.parametrize("dtype", list(NEAR))


def random_heads(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def distance(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((found.double() - wanted).norm() / wanted.norm()).item()


def scores_of(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return query.double() @ key.double().mT * query.shape[-1] ** -0.5


@pytest.fixture(autouse=True)
def no_tiles(monkeypatch):
    """A CPU with bf16 and a slow MKL, without tiles for matrix products: elsewhere the kernel does
    it."""
    monkeypatch.setattr(kernel, "BF16", True)
    monkeypatch.setattr(kernel, "SLOW_MKL", True)
    monkeypatch.setattr(kernel, "MATRIX_TILES", False)
    monkeypatch.setattr(onednn, "FEW", 1)  # heads are narrow here


@pytest.fixture
def calls(monkeypatch) -> Counter[str]:
    """What was done, in precisions below float64; parts are small enough for short documents."""
    found: Counter[str] = Counter()

    def count(module, name):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            found[name] += args[0].dtype != torch.float64
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    for module, name in ((seen, "weigh"), (seen, "weigh_backward"), (kernel, "attend")):
        count(module, name)
    monkeypatch.setattr(flash, "CAUSAL_LEAF", 8)
    monkeypatch.setattr(attention_plan, "LEAF_ROWS", 16)
    monkeypatch.setattr(attention_plan, "LEAF_SLOTS", 4)
    monkeypatch.setattr(attention_plan, "UNIT", 4)
    return found


@PRECISIONS
@pytest.mark.parametrize("tile", [8, 512])
@pytest.mark.parametrize("gain", [1, 12])  # 12: norms of hundreds
@pytest.mark.parametrize(("shared", "groups", "rows", "slots"), [(1, 1, 1, 5), (2, 3, 21, 30)])
def test_slots_weigh_what_their_scores_exceed_the_norm_by(
    tile, gain, shared, groups, rows, slots, dtype, monkeypatch
):
    monkeypatch.setattr(unmasked, "TILE", tile)
    monkeypatch.setattr(unmasked, "UNIT", 4)
    query = random_heads(shared, groups, rows, 16, seed=1, dtype=dtype) * gain
    key, value = (random_heads(1, groups, slots, 16, seed=n, dtype=dtype) for n in (2, 3))
    key = key * gain
    norm = torch.linspace(-3, 3, shared * groups * rows).view(shared, groups, rows)
    norm += scores_of(query, key).logsumexp(-1).float()
    weights = (scores_of(query, key) - norm.double()[..., None]).exp()
    near = max(NEAR[dtype], torch.finfo(torch.float32).eps * norm.abs().max().item())
    found = unmasked.weigh(query, key, value, norm)
    assert distance(found[1], weights.sum(-1)) < near
    assert distance(found[0], weights @ value.double()) < near


@PRECISIONS
@pytest.mark.parametrize("tile", [8, 512])
def test_gradients_of_two_halves_are_those_of_the_whole(tile, dtype, monkeypatch):
    monkeypatch.setattr(unmasked, "TILE", tile)
    monkeypatch.setattr(unmasked, "UNIT", 4)
    query, onward = (random_heads(2, 3, 21, 16, seed=n, dtype=dtype) for n in (1, 2))
    key, value = (random_heads(1, 3, 30, 16, seed=n, dtype=dtype) for n in (3, 4))
    inputs = [x.double().requires_grad_() for x in (query, key, value)]
    scores = scores_of(*inputs[:2])
    out, norm = scores.softmax(-1) @ inputs[2], scores.logsumexp(-1).detach().float()
    wanted = torch.autograd.grad(out, inputs, onward.double())
    shift = (onward * out.detach()).sum(-1).float()
    halves = [
        unmasked.weigh_backward(onward, query, key[:, :, part], value[:, :, part], shift, norm)
        for part in (slice(0, 11), slice(11, 30))
    ]
    for_query, *pairs = zip(*halves, strict=True)
    assert distance(sum(for_query), wanted[0]) < NEAR[dtype]
    for found, want in zip(pairs, wanted[1:], strict=True):
        assert distance(torch.cat(found, 2), want) < NEAR[dtype]


@pytest.mark.parametrize("above", [-200.0, 0.0, 5.0, 20.0, 200.0])
def test_a_part_far_above_or_below_what_was_seen_before_is_added_all_the_same(above, calls):
    query = random_heads(2, 3, 21, 16, seed=1)
    key, value = (random_heads(1, 3, 30, 16, seed=n) for n in (2, 3))
    scores = scores_of(query, key)
    before = (scores.logsumexp(-1) - above).float()
    total, norm = torch.ones(2, 3, 21, 16), before.clone()
    pairs = (x.expand(2, -1, -1, -1) for x in (key, value))
    merge(total, norm, *seen.attend(query, *pairs, norm, None))
    everything = torch.logaddexp(scores.logsumexp(-1), before.double())
    share = (before.double() - everything).exp()[..., None]
    wanted = share + (scores - everything[..., None]).exp() @ value.double()
    assert total.isfinite().all() and distance(total, wanted) < NEAR[torch.bfloat16]
    assert torch.allclose(norm.double(), everything, rtol=1e-3, atol=1e-2)
    assert calls["weigh"] == 1 and calls["attend"] == (above > 10)


def both(attend, inputs: list[torch.Tensor], dtype: torch.dtype) -> list[float]:
    """Distances from float64: of the result, and of the gradient of each input."""
    found = []
    for precision in (dtype, torch.float64):
        leaves = [x.to(precision).requires_grad_() for x in inputs]
        out = attend(*leaves)
        onward = random_heads(*out.shape, seed=9).to(precision)
        found.append([out, *torch.autograd.grad(out, leaves, onward)])
    return [distance(a.detach(), b.detach()) for a, b in zip(*found, strict=True)]


@PRECISIONS
def test_causal_attention_is_that_of_float64(dtype, calls):
    lengths = [50, 7, 33]
    inputs = [random_heads(sum(lengths), heads, 16, seed=heads) for heads in (4, 2, 2)]
    inputs[2] = random_heads(sum(lengths), 2, 16, seed=5)
    near = both(lambda *x: flash_causal_attention(*x, document_lengths=lengths), inputs, dtype)
    assert max(near) < NEAR[dtype]
    leaves = attention_plan.plan_causal(lengths, flash.CAUSAL_LEAF).leaves
    assert calls["weigh"] == calls["weigh_backward"] > 8 and calls["attend"] == len(leaves)


DOCUMENT = torch.repeat_interleave(torch.arange(3), torch.tensor([50, 7, 33]))


def rollout_rows() -> Rows:
    rows = sample_rows(
        torch.ones(90, dtype=torch.bool),
        DOCUMENT,
        cod=Cod(4, 0.8),
        generator=torch.Generator().manual_seed(0),
    )
    return Rows(*(x[rows.depth > 0] for x in rows))


def rollout_inputs(rows: Rows) -> list[torch.Tensor]:
    """Queries, own pairs, prefix pairs."""
    counts = [(len(rows.anchor), 4), *[(len(rows.anchor), 2)] * 2, *[(90, 2)] * 2]
    return [random_heads(n, heads, 16, seed=i) for i, (n, heads) in enumerate(counts)]


@PRECISIONS
def test_rollout_attention_is_that_of_float64(dtype, calls):
    rows = rollout_rows()
    plan = attention_plan.plan_flash(rows, DOCUMENT)
    attend = partial(flash_rollout_attention, plan=plan)
    assert max(both(attend, rollout_inputs(rows), dtype)) < NEAR[dtype]
    assert calls["weigh"] == calls["weigh_backward"] > 4 and calls["attend"] == len(plan.leaves)


@PRECISIONS
def test_where_the_kernel_is_as_fast_it_does_all(dtype, calls, monkeypatch):
    monkeypatch.setattr(kernel, "BF16", False)
    monkeypatch.setattr(kernel, "SLOW_MKL", False)
    rows = rollout_rows()
    attend = partial(flash_rollout_attention, plan=attention_plan.plan_flash(rows, DOCUMENT))
    assert max(both(attend, rollout_inputs(rows), dtype)) < NEAR[dtype]
    assert calls["attend"] > 4 and not calls["weigh"] and not calls["weigh_backward"]
    calls.clear()
    inputs = [random_heads(60, heads, 16, seed=heads, dtype=dtype) for heads in (4, 2, 2)]
    flash_causal_attention(*inputs, document_lengths=[60])
    assert calls == {"attend": 1}


def test_places_are_where_rows_stand():
    first, of = places(torch.tensor([5, 6, 9, 6, 7, 9]))
    assert first.tolist() == [0, 1, 4, 2] and of.tolist() == [0, 1, 3, 1, 2, 3]


# 1: as drafters are. 30: rows of one place whose own rollouts outweigh, or not, all before them.
@pytest.mark.parametrize("gain", [1, 30])
@pytest.mark.parametrize(
    ("dtype", "near"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 2e-2)]
)
def test_rows_with_one_query_per_place_attend_as_each_for_itself(dtype, near, gain, calls):
    rows = rollout_rows()
    plan = attention_plan.plan_flash(rows, DOCUMENT)
    inputs = rollout_inputs(rows)
    inputs[1] = inputs[1] * gain
    at_places = random_heads(90, 4, 16, seed=7)
    found = []
    for precision, alike in ((getattr(torch, dtype), True), (torch.float64, False)):
        leaves = [x.to(precision).requires_grad_() for x in (at_places, *inputs[1:])]
        query = leaves[0][rows.position]
        out = flash_rollout_attention(query, *leaves[1:], plan=plan, alike=alike)
        onward = random_heads(*out.shape, seed=9).to(precision)
        found.append([out, *torch.autograd.grad(out, leaves, onward)])
    assert max(distance(a.detach(), b.detach()) for a, b in zip(*found, strict=True)) < near
    if dtype != "float64":
        assert calls["weigh"] == calls["weigh_backward"] == len(plan.full) > 4


def test_autocast_does_not_round_attention_in_float32(calls):
    rows = rollout_rows()
    plan = attention_plan.plan_flash(rows, DOCUMENT)
    _, *others = (x.float() for x in rollout_inputs(rows))
    query = random_heads(90, 4, 16, seed=7).float()[rows.position]
    attend = partial(flash_rollout_attention, query, *others, plan=plan, alike=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = attend()
    assert calls["weigh"] > 4 and torch.equal(found, attend())


@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_share_keys_may_go_through_as_rows_of_one(masked, monkeypatch):
    query, onward = (random_heads(2, 3, 21, 16, seed=n).double() for n in (1, 2))
    pairs = [random_heads(1, 3, 30, 16, seed=n).double().expand(2, -1, -1, -1) for n in (3, 4)]
    mask = None
    if masked:
        hidden = torch.arange(30) > torch.arange(21)[:, None] + 9
        mask = torch.zeros(21, 30, dtype=torch.double).masked_fill_(hidden, -torch.inf)
    found = []
    for worth in (True, False):
        monkeypatch.setattr(kernel, "worth_stacking", lambda _, worth=worth: worth)
        out, norm = kernel.attend(query, *pairs, mask=mask)
        grads = kernel.attend_backward(onward, query, *pairs, out, norm, mask=mask)
        found.append([out, norm, grads[0], *(g.sum(0) for g in grads[1:])])
    for one, other in zip(*found, strict=True):
        assert torch.allclose(one, other, rtol=1e-12, atol=1e-12)


def test_heads_of_many_rows_go_through_by_themselves(monkeypatch):
    shapes, real = [], kernel.flash
    monkeypatch.setattr(
        kernel, "flash", lambda x, *a, **k: shapes.append(x.shape) or real(x, *a, **k)
    )
    monkeypatch.setattr(kernel, "MANY", 20)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    for rows in (19, 20):
        query, key, value = (random_heads(2, 3, n, 8, seed=n) for n in (rows, 30, 30))
        kernel.attend(query, key, value)
    assert shapes == [(1, 3, 38, 8), (2, 3, 20, 8)]


def test_only_bf16_is_attended_to_in_half_precision():
    found = {dtype: kernel.fast_dtype(dtype, 2048) for dtype in (torch.bfloat16, torch.float16)}
    assert found == {torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}


@PRECISIONS
def test_no_rows_weigh_nothing(dtype):
    query, key, value = (
        random_heads(1, 3, count, 16, seed=count, dtype=dtype) for count in (0, 40, 40)
    )
    none = torch.zeros(1, 3, 0)
    gained, weight = unmasked.weigh(query, key, value, none)
    assert gained.shape == (1, 3, 0, 16) and weight.shape == (1, 3, 0)
    found = unmasked.weigh_backward(query, query, key, value, none, none)
    assert [x.shape for x in found] == [query.shape, key.shape, value.shape]
    assert not any(x.any() for x in found)
