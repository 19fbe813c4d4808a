"""The block mask of FlexAttention against the one rule, and its attention against the CPU's.

Compiled by a backend that only counts, FlexAttention runs as plain PyTorch on any machine.
"""

import pytest
import torch
from drawn_rows import CPU, drawn
from torch._dynamo.testing import CompileCounter
from torch.nn.attention.flex_attention import create_mask, flex_attention

from peagle.cod.mask import visible
from peagle.cod.sampling import Rows
from peagle.kernels import attention
from peagle.kernels.cpu.attention import flash_rollout_attention
from peagle.kernels.cpu.attention_tiles import plan_flash
from peagle.kernels.cuda import cudnn_attention as dense
from peagle.kernels.cuda.flex_attention import (
    BLOCK,
    flex_rollout_attention,
    plan_flex,
    whole_blocks,
)
from peagle.model.layers import turned, turned_at_once


def wanted_mask(rows, document):
    """[rows, slots | rows] of the rule, with the places where the block mask puts them."""
    slots = torch.arange(len(document))
    keys = Rows(torch.cat([slots, rows.anchor]), torch.cat([torch.zeros_like(slots), rows.depth]))
    places = torch.cat([slots, whole_blocks(len(document)) + torch.arange(len(rows.anchor))])
    return visible(rows, keys, document), places


@pytest.mark.parametrize("lengths", [(700,), (300, 5, 140, 400), (90, 80)])
def test_the_block_mask_is_the_rule_of_visibility(lengths):
    rows, document = drawn(*lengths)
    plan = plan_flex(rows, document, device=CPU, dense=False).mask
    dense = create_mask(plan.mask_mod, 1, 1, *plan.seq_lengths, device="cpu")[0, 0]
    expected, places = wanted_mask(rows, document)
    assert len(rows.anchor) > 2 * BLOCK
    seen = dense[: len(expected)]
    assert torch.equal(seen[:, places], expected)
    assert seen.sum() == expected.sum()  # and nothing in the filling
    assert dense.any(-1).all()  # no softmax over nothing


@pytest.mark.parametrize("lengths", [(700,), (300, 5, 140, 400), (90, 80)])
def test_blocks_cover_what_is_seen_and_full_ones_need_no_mask(lengths):
    rows, document = drawn(*lengths)
    plan = plan_flex(rows, document, device=CPU, dense=False).mask
    dense = create_mask(plan.mask_mod, 1, 1, *plan.seq_lengths, device="cpu")[0, 0]
    blocks = dense.unflatten(1, (-1, BLOCK)).unflatten(0, (-1, BLOCK)).transpose(1, 2).flatten(2)
    partial, full = (
        listed(count[0, 0], index[0, 0])
        for count, index in (
            (plan.kv_num_blocks, plan.kv_indices),
            (plan.full_kv_num_blocks, plan.full_kv_indices),
        )
    )
    assert not (partial & full).any()
    assert not (blocks.any(-1) & ~(partial | full)).any()
    assert blocks.all(-1)[full].all()
    if len(lengths) == 1:  # hardly a block is masked that need not be
        assert full.sum() == blocks.all(-1).sum() > 0
        assert (partial & ~blocks.any(-1)).sum() == 0


def test_rows_that_fill_up_a_block_see_what_its_last_row_sees(monkeypatch):
    for name, size in {"MOST_ROWS": 192, "UNIT_SLOTS": 128, "LEAST_PAIRS": 1}.items():
        monkeypatch.setattr(dense, name, size)
    rows, document = drawn(1500)
    rows = Rows(*(x[-192:] for x in rows))  # a block and a half, all of them dense
    rows = rows._replace(depth=rows.depth - rows.depth[0] + 1) if rows.depth[0] > 1 else rows
    plan = plan_flex(rows, document, device=CPU, dense=True)
    assert plan.dense[0].slots.stop > 1000
    assert plan.mask.kv_num_blocks[0, 0, -1] <= 4


@pytest.mark.parametrize("length", [300, 256])
def test_depth_zero_on_cuda_is_padded_to_lengths_that_are_few(length, monkeypatch):
    monkeypatch.setattr(attention, "suits", lambda _: True)
    monkeypatch.setattr(attention, "LONG", 100)
    monkeypatch.setattr(attention, "UNIT_SLOTS", 128)
    asked, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def noting(query, *others, **options):
        asked.append(query.shape[2])
        return sdpa(query, *others, **options)

    inputs = [torch.randn(length, heads, 16, dtype=torch.float64) for heads in (4, 2, 2)]
    wanted = attention.causal_attention(*inputs, document_lengths=[length])
    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", noting)
    assert torch.allclose(attention.causal(*inputs), wanted, atol=1e-12)
    assert asked == [-(-length // 128) * 128]


def test_rotation_has_one_result_in_both_its_forms():
    x, cos, sin = torch.randn(9, 4, 16), torch.randn(9, 1, 8), torch.randn(9, 1, 8)
    for some in (x, x[:1]):
        assert torch.allclose(turned_at_once(some, cos, sin), turned(some, cos, sin), atol=1e-6)


def listed(count, index):
    """[query blocks, key blocks] of the lists of a block mask."""
    named = torch.arange(index.shape[1]) < count[:, None]
    return torch.zeros_like(index, dtype=torch.bool).scatter(1, index.long(), named)


def states(rows, document, heads=4, groups=2, width=16):
    generator = torch.Generator().manual_seed(1)

    def normal(count, of):
        return torch.randn(count, of, width, generator=generator)

    count, slots = len(rows.anchor), len(document)
    own = (normal(count, heads), normal(count, groups), normal(count, groups))
    return *own, normal(slots, groups), normal(slots, groups)


@pytest.mark.parametrize("width", [8, 16])
def test_flex_equals_the_cpu_path_and_is_compiled_once_for_all_lengths(width):
    counter = CompileCounter()
    kernel = torch.compile(flex_attention, dynamic=True, backend=counter)
    for seed, lengths in enumerate([(260, 40), (500,), (30, 7, 300, 90), (220, 210)]):
        rows, document = drawn(*lengths, seed=seed)
        inputs = states(rows, document, width=width)
        plan = plan_flex(rows, document, device=CPU, dense=False)
        with torch.no_grad():
            got = flex_rollout_attention(*inputs, plan=plan, kernel=kernel)
        want = flash_rollout_attention(*inputs, plan=plan_flash(rows, document))
        assert torch.allclose(got, want, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_flex_gives_the_gradients_of_the_cpu_path():
    rows, document = drawn(900, 300, 41)
    inputs = [x.requires_grad_() for x in states(rows, document, width=64)]
    want = flash_rollout_attention(*inputs, plan=plan_flash(rows, document))
    onward = torch.randn_like(want)
    wanted = torch.autograd.grad(want, inputs, onward)
    there = [x.detach().cuda().requires_grad_() for x in inputs]
    plan = plan_flex(rows, document, device=torch.device("cuda"), dense=False)
    got = flex_rollout_attention(*there, plan=plan)
    for ours, theirs in zip(torch.autograd.grad(got, there, onward.cuda()), wanted, strict=True):
        assert (ours.cpu() - theirs).norm() <= 1e-2 * theirs.norm()  # tf32
