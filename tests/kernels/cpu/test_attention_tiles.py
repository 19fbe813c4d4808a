"""How attention is cut into parts: together they are the one rule, each pair once."""

import pytest
import torch

from peagle.cod.mask import visible
from peagle.cod.sampling import Cod, Rows, sample_rows
from peagle.kernels.cpu import attention_tiles as attention_plan
from peagle.kernels.cpu.attention import CAUSAL_LEAF
from peagle.kernels.cpu.attention_tiles import UNIT, Plan, plan_causal, plan_flash


def rollouts(document: torch.Tensor, supervised: torch.Tensor, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return sample_rows(supervised, document, cod=Cod(6, 0.8), generator=generator).deeper()


def wanted(rows: Rows, document: torch.Tensor) -> torch.Tensor:
    """[rows, slots | rows] of the rule."""
    slots = torch.arange(len(document))
    anchor = torch.cat([slots, rows.anchor])
    depth = torch.cat([torch.zeros_like(slots), rows.depth])
    return visible(rows, Rows(anchor, depth), document).int()


def counted(plan: Plan, rows: Rows, slots: int) -> torch.Tensor:
    """How often the parts of a plan let each row see each slot and row."""
    found = torch.zeros(len(rows.anchor), slots + len(rows.anchor), dtype=torch.int)
    for part in plan.full:
        assert part.mask is None and part.slots.stop > part.slots.start
        found[part.rows, part.slots] += 1
    for part in plan.leaves:
        seen = part.mask.isfinite().int()
        count = part.slots.stop - part.slots.start
        found[part.rows, part.slots] += seen[:, :count]
        found[part.rows, slots + part.rows.start : slots + part.rows.stop] += seen[:, count:]
    return found


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("lengths", [(900,), (130, 3, 517, 258), (1, 2, 1), (64, 128, 449)])
@pytest.mark.parametrize("late", [0.0, 0.6])  # the part of each document before its first anchor
def test_parts_of_rollouts_are_the_rule_each_pair_once(lengths, late, small, monkeypatch):
    unit = 4 if small else UNIT
    if small:
        for name, value in (("LEAF_ROWS", 16), ("LEAF_SLOTS", 4), ("UNIT", unit)):
            monkeypatch.setattr(attention_plan, name, value)
    document = torch.repeat_interleave(torch.tensor(lengths))
    supervised = torch.cat([torch.arange(n) >= late * n for n in lengths])
    rows = rollouts(document, supervised, seed=len(lengths))
    plan = plan_flash(rows, document)
    assert torch.equal(counted(plan, rows, len(document)), wanted(rows, document))
    assert all((part.slots.stop - part.slots.start) % unit == 0 for part in plan.full)
    assert len(plan.full) > 0 or max(lengths) < 600


@pytest.mark.parametrize("leaf", [None, CAUSAL_LEAF])
def test_parts_of_depth_zero_are_a_triangle_for_every_length(leaf):
    for length in [*range(1, 1025, 31), 449, 511, 512, 513, 1000, 1500]:
        plan = plan_causal([7, length], leaf)
        found = torch.zeros(length + 7, length + 7, dtype=torch.int)
        for part in plan.leaves:
            rows = part.rows.stop - part.rows.start
            assert part.rows == part.slots and rows <= (leaf or length + 7)
            found[part.rows, part.slots] += torch.ones(rows, rows, dtype=torch.int).tril()
        for part in plan.full:
            assert (part.slots.stop - part.slots.start) % UNIT == 0
            found[part.rows, part.slots] += 1
        triangles = [torch.ones(n, n, dtype=torch.int).tril() for n in (7, length)]
        assert torch.equal(found, torch.block_diag(*triangles))
