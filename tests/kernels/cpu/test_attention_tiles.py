"""How attention is cut into tiles: together they are the one rule, each pair once."""

import pytest
import torch

from peagle.cod.mask import visible
from peagle.cod.sampling import Cod, Rows, sample_rows
from peagle.kernels.cpu import attention_tiles
from peagle.kernels.cpu.attention import CAUSAL_SLOTS
from peagle.kernels.cpu.attention_tiles import UNIT, Tiling, tile_documents, tile_rollouts


def rollouts(document: torch.Tensor, supervised: torch.Tensor, seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    return sample_rows(supervised, document, cod=Cod(6, 0.8), generator=generator).mtp()


def wanted(rows: Rows, document: torch.Tensor) -> torch.Tensor:
    """[rows, slots | rows] of the rule."""
    slots = torch.arange(len(document))
    anchor = torch.cat([slots, rows.anchor])
    depth = torch.cat([torch.zeros_like(slots), rows.depth])
    return visible(rows, Rows(anchor, depth), document).int()


def counted(tiling: Tiling, rows: Rows, slots: int) -> torch.Tensor:
    """How often the tiles let each row see each slot and row."""
    found = torch.zeros(len(rows.anchor), slots + len(rows.anchor), dtype=torch.int)
    for tile in tiling.full:
        assert tile.mask is None and tile.slots.stop > tile.slots.start
        found[tile.rows, tile.slots] += 1
    for tile in tiling.diagonal:
        seen = tile.mask.isfinite().int()
        count = tile.slots.stop - tile.slots.start
        found[tile.rows, tile.slots] += seen[:, :count]
        found[tile.rows, slots + tile.rows.start : slots + tile.rows.stop] += seen[:, count:]
    return found


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("lengths", [(900,), (130, 3, 517, 258), (1, 2, 1), (64, 128, 449)])
@pytest.mark.parametrize("late", [0.0, 0.6])  # the share of each document before its first anchor
def test_tiles_of_rollouts_are_the_rule_each_pair_once(lengths, late, small, monkeypatch):
    unit = 4 if small else UNIT
    if small:
        for name, value in (("DIAGONAL_ROWS", 16), ("DIAGONAL_SLOTS", 4), ("UNIT", unit)):
            monkeypatch.setattr(attention_tiles, name, value)
    document = torch.repeat_interleave(torch.tensor(lengths))
    supervised = torch.cat([torch.arange(n) >= late * n for n in lengths])
    rows = rollouts(document, supervised, seed=len(lengths))
    tiling = tile_rollouts(rows, document)
    assert torch.equal(counted(tiling, rows, len(document)), wanted(rows, document))
    assert all((tile.slots.stop - tile.slots.start) % unit == 0 for tile in tiling.full)
    assert len(tiling.full) > 0 or max(lengths) < 600


@pytest.mark.parametrize("size", [None, CAUSAL_SLOTS])
def test_tiles_of_ntp_are_a_triangle_for_every_length(size):
    for length in [*range(1, 1025, 31), 449, 511, 512, 513, 1000, 1500]:
        tiling = tile_documents([7, length], size)
        found = torch.zeros(length + 7, length + 7, dtype=torch.int)
        for tile in tiling.diagonal:
            rows = tile.rows.stop - tile.rows.start
            assert tile.rows == tile.slots and rows <= (size or length + 7)
            found[tile.rows, tile.slots] += torch.ones(rows, rows, dtype=torch.int).tril()
        for tile in tiling.full:
            assert (tile.slots.stop - tile.slots.start) % UNIT == 0
            found[tile.rows, tile.slots] += 1
        triangles = [torch.ones(n, n, dtype=torch.int).tril() for n in (7, length)]
        assert torch.equal(found, torch.block_diag(*triangles))
