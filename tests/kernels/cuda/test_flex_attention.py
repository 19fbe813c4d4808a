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
from peagle.kernels.cpu.backend import Cpu
from peagle.kernels.cuda import backend, cudnn_attention
from peagle.kernels.cuda.flex_attention import BLOCK, flex_mtp_attention, plan_flex, whole_blocks


def wanted_mask(rows, document):
    """[rows, slots | rows] of the rule, with the places where the block mask puts them."""
    slots = torch.arange(len(document))
    keys = Rows(torch.cat([slots, rows.anchor]), torch.cat([torch.zeros_like(slots), rows.depth]))
    places = torch.cat([slots, whole_blocks(len(document)) + torch.arange(len(rows.anchor))])
    return visible(rows, keys, document), places


@pytest.mark.parametrize("lengths", [(700,), (300, 5, 140, 400), (90, 80)])
def test_the_block_mask_is_the_rule_of_visibility(lengths):
    rows, document = drawn(*lengths)
    plan = plan_flex(rows, document, device=CPU, cudnn=False).mask
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
    plan = plan_flex(rows, document, device=CPU, cudnn=False).mask
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
        monkeypatch.setattr(cudnn_attention, name, size)
    rows, document = drawn(1500)
    rows = Rows(*(x[-192:] for x in rows))  # a block and a half, all of them shared
    rows = rows._replace(depth=rows.depth - rows.depth[0] + 1) if rows.depth[0] > 1 else rows
    plan = plan_flex(rows, document, device=CPU, cudnn=True)
    assert plan.shared[0].slots.stop > 1000
    assert plan.mask.kv_num_blocks[0, 0, -1] <= 4


@pytest.mark.parametrize("length", [300, 256])
def test_ntp_on_cuda_is_padded_to_lengths_that_are_few(length, monkeypatch):
    monkeypatch.setattr(backend, "is_supported", lambda _: True)
    monkeypatch.setattr(backend, "LONG", 100)
    monkeypatch.setattr(backend, "UNIT_SLOTS", 128)
    asked, sdpa = [], torch.nn.functional.scaled_dot_product_attention

    def noting(query, *others, **options):
        asked.append(query.shape[2])
        return sdpa(query, *others, **options)

    inputs = [torch.randn(length, heads, 16, dtype=torch.float64) for heads in (4, 2, 2)]
    wanted = Cpu().ntp_attention(*inputs, document_lengths=[length])
    monkeypatch.setattr(backend.F, "scaled_dot_product_attention", noting)
    assert torch.allclose(backend.causal_attention(*inputs), wanted, atol=1e-12)
    assert asked == [-(-length // 128) * 128]


def listed(count, index):
    """[query blocks, key blocks] of the lists of a block mask."""
    named = torch.arange(index.shape[1]) < count[:, None]
    return torch.zeros_like(index, dtype=torch.bool).scatter(1, index.long(), named)


def on_cpu(inputs, rows, document):
    plan = Cpu().plan_mtp_attention(rows, document, value=inputs[4])
    return Cpu().mtp_attention(*inputs, plan=plan)


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
        plan = plan_flex(rows, document, device=CPU, cudnn=False)
        with torch.no_grad():
            got = flex_mtp_attention(*inputs, plan=plan, kernel=kernel)
        want = on_cpu(inputs, rows, document)
        assert torch.allclose(got, want, atol=1e-5)
    assert counter.frame_count == 1


@pytest.mark.gpu
def test_flex_gives_the_gradients_of_the_cpu_path():
    rows, document = drawn(900, 300, 41)
    inputs = [x.requires_grad_() for x in states(rows, document, width=64)]
    want = on_cpu(inputs, rows, document)
    onward = torch.randn_like(want)
    wanted = torch.autograd.grad(want, inputs, onward)
    there = [x.detach().cuda().requires_grad_() for x in inputs]
    plan = plan_flex(rows, document, device=torch.device("cuda"), cudnn=False)
    got = flex_mtp_attention(*there, plan=plan)
    for ours, theirs in zip(torch.autograd.grad(got, there, onward.cuda()), wanted, strict=True):
        assert (ours.cpu() - theirs).norm() <= 1e-2 * theirs.norm()  # tf32
