"""Shared tiles: which they are, and how they are put together with what is masked.

cuDNN's kernels run on CUDA only (``test_cuda.py``); plain ones of the same form stand in here.
"""

import pytest
import torch
from drawn_rows import CPU, drawn

from peagle.cod.mask import visible
from peagle.kernels.cuda import cudnn_attention
from peagle.kernels.cuda.cudnn_attention import SharedTile, add_shared, shared_tiles
from peagle.kernels.cuda.flex_attention import plan_flex


@pytest.fixture
def small(monkeypatch):
    """Units that small examples are made of."""
    for name, size in {
        "MOST_ROWS": 96,
        "UNIT_ROWS": 32,
        "UNIT_SLOTS": 64,
        "LEAST_PAIRS": 1,
    }.items():
        monkeypatch.setattr(cudnn_attention, name, size)


@pytest.mark.parametrize("lengths", [(700,), (300, 5, 140, 400), (90, 80), (40,)])
def test_tiles_are_seen_by_all_their_rows_and_the_mask_has_the_rest(small, lengths):
    rows, document = drawn(*lengths)
    tiles = shared_tiles(rows, document)
    seen = visible(rows, rows.__class__(torch.arange(len(document)), 0 * document), document)
    assert (len(tiles) > 2) == (max(lengths) >= 300)
    covered = torch.zeros_like(seen)
    for tile in tiles:
        assert seen[tile].all() and not covered[tile].any()
        covered[tile] = True
    plan = plan_flex(rows, document, device=CPU, cudnn=True)
    index = torch.arange(plan.mask.seq_lengths[0])[:, None]
    masked = plan.mask.mask_mod(0, 0, index, torch.arange(len(document)))[: len(seen)]
    assert plan.shared == tiles
    assert torch.equal(masked | covered, seen) and not (masked & covered).any()


def test_short_sequences_have_none():
    assert shared_tiles(*drawn(900)) == []


def scores(query, key):
    shared = query.shape[1] // key.shape[1]
    return query @ key.repeat_interleave(shared, 1).mT * query.shape[-1] ** -0.5


def plain(query, key, value, *_):
    """As cuDNN's: the context, the log-sum-exp, and what only the backward pass wants."""
    s = scores(query, key)
    out = torch.softmax(s, -1) @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    return out, torch.logsumexp(s, -1)[..., None], None, None, 0, 0, None, None, None


def plain_backward(grad, query, key, value, out, lse, *_):
    shared = query.shape[1] // key.shape[1]
    keys, values = (x.repeat_interleave(shared, 1) for x in (key, value))
    weights = torch.exp(scores(query, key) - lse)
    slope = weights * (grad @ values.mT - (grad * out).sum(-1, keepdim=True))
    slope = slope * query.shape[-1] ** -0.5
    summed = (x.unflatten(1, (-1, shared)).sum(2) for x in (slope.mT @ query, weights.mT @ grad))
    return slope @ keys, *summed


def test_what_is_put_together_is_attention_over_all_keys(monkeypatch):
    monkeypatch.setattr(cudnn_attention, "forward", plain)
    monkeypatch.setattr(cudnn_attention, "backward", plain_backward)
    inputs = [
        torch.randn(1, heads, length, 8, dtype=torch.float64, requires_grad=True)
        for heads, length in ((4, 30), (2, 50), (2, 50))
    ]
    tiles = [SharedTile(slice(0, 12), slice(0, 20)), SharedTile(slice(15, 30), slice(4, 44))]
    left = torch.ones(30, 50, dtype=torch.bool)
    for tile in tiles:
        left[tile] = False

    def attended(query, key, value, mask):
        s = scores(query, key).masked_fill(~mask, -torch.inf)
        return torch.softmax(s, -1) @ value.repeat_interleave(2, 1), torch.logsumexp(s, -1)

    want, _ = attended(*inputs, torch.ones_like(left))
    got = add_shared(*inputs, *attended(*inputs, left), tiles)
    assert torch.allclose(got, want, atol=1e-12)
    onward = torch.randn_like(want)
    wanted, found = (torch.autograd.grad(x, inputs, onward) for x in (want, got))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-12 * other.norm()
