"""A memory budget turned into rows per segment, against what a step's tensors really take."""

import re

import pytest
import torch
from random_parts import make_drafter
from torch.optim import AdamW
from torch.profiler import ProfilerActivity, profile

from peagle.cod.sampling import Cod, expected_rows, sample_rows
from peagle.cod.segments import partition
from peagle.model.config import PEagleConfig
from peagle.model.p_eagle import PEagleDrafter
from peagle.store.sample import Sample
from peagle.target.head import TargetHead
from peagle.train.memory import copied_bytes, parameters, rows_within
from peagle.train.objective import objective
from peagle.train.packing import Batch, pack

SETTINGS = {"slots": 64, "rollout": 8, "mtp_share": 0.7, "element": 4, "recompute": False}


def large(**changes):
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}
    width = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 8192}
    return PEagleConfig(num_hidden_layers=4, **width, **heads, **changes)


@pytest.mark.parametrize("changes", [{}, {"num_hidden_layers": 4}, {"draft_vocab_size": 20}])
def test_the_weights_are_counted(changes):
    drafter = make_drafter(**changes)
    matrices = sum(p.numel() for p in drafter.parameters() if p.ndim == 2)
    assert parameters(drafter.config) == matrices


@pytest.mark.parametrize(
    "changes", [{}, {"parallel_drafting": False}, {"hidden_state": "anchor_scaled"}]
)
def test_weights_of_segments_are_counted_once_more_in_bf16(changes):
    drafter = make_drafter(**changes)
    shared = sum(p.numel() for p in drafter.shared_parameters() if p.ndim == 2)
    assert 2 * shared < copied_bytes(drafter.config, 2) < 4 * parameters(drafter.config)
    assert copied_bytes(drafter.config, 4) == 0


def rows(gigabytes, **changes):
    settings = {**SETTINGS, "slots": 4096, **changes}
    return rows_within(gigabytes, large(), **settings)


def test_more_memory_means_more_rows_and_longer_sequences_leave_fewer():
    assert 2 * rows(4.0) < rows(8.0)  # what does not depend on the segment is paid once
    assert rows(4.0, slots=8192) < rows(4.0)
    assert rows(4.0, element=2) > rows(4.0)
    assert rows(4.0, recompute=True) > rows(4.0)
    assert rows(4.0, mtp_share=0.5) > rows(4.0)  # only those pass through the layers again


def test_rows_of_eagle3_keep_their_attention_weights():
    budget = {**SETTINGS, "slots": 4096}
    kept = {
        parallel: rows_within(8.0, large(parallel_drafting=parallel), **budget)
        for parallel in (True, False)
    }
    assert kept[False] < kept[True] / 2  # 4 layers of 8 heads over 4,096 slots: 0.5 MB a row


def test_a_budget_below_one_segment_names_the_smallest_that_works():
    with pytest.raises(ValueError, match=r"0\.001 cannot hold one segment of 64 slots") as error:
        rows_within(0.001, large(), **SETTINGS)
    least = float(re.search(r"at least ([\d.]+)", str(error.value))[1])
    assert rows_within(least, large(), **SETTINGS) >= 8
    with pytest.raises(ValueError, match=f"at least {least:g}"):
        rows_within(least - 0.02, large(), **SETTINGS)


WIDTH, COD = 128, Cod(8, 0.7, 0.2)


def medium(heads=4):
    heads = {"num_attention_heads": heads, "num_key_value_heads": 2, "head_dim": 32}
    width = {"hidden_size": WIDTH, "intermediate_size": 352, "vocab_size": 256}
    layers = {"num_hidden_layers": 4, "eagle_aux_hidden_state_layer_ids": (1, 2, 3)}
    return PEagleConfig(mask_token_id=5, **width, **heads, **layers)


def batch_within(max_rows, slots):
    """One document, all of it supervised."""
    states = torch.randn(slots + 2, 4 * WIDTH).bfloat16()
    slots = pack([Sample(
        input_ids=torch.randint(6, 256, (slots + 2,)),
        loss_mask=torch.ones(slots + 2, dtype=torch.bool),
        aux=states[:, :-WIDTH].contiguous(),
        final=states[:, -WIDTH:].contiguous(),
    )])  # fmt: skip
    expected = expected_rows(slots["supervised"], slots["document"], cod=COD)
    return Batch(**slots, segments=partition(expected, max_rows=max_rows), seed=0)


def peak_of_steps(batch, config, *, bf16, recompute):
    """Bytes of tensors at the highest moment of two steps, weights and batch counted."""
    drafter = PEagleDrafter(config)
    vectors = {"norm": torch.ones(WIDTH), "embedding": torch.randn(256, WIDTH)}
    head = TargetHead(head=torch.randn(256, WIDTH), **vectors, eps=1e-6, softcap=None)
    rows = sample_rows(
        batch.supervised, batch.document, cod=COD, generator=torch.Generator().manual_seed(0)
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        optimizer = AdamW(drafter.parameters(), lr=1e-4)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = objective(
                    drafter, head, batch, rows, mix={"kl": 1.0}, recompute=recompute
                ).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert len(events) > 1000
    total = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        peak = max(peak, total)
    held = [*drafter.parameters(), head.head, batch.aux, batch.final]
    return peak + sum(tensor.nbytes for tensor in held)


@pytest.mark.parametrize(
    ("bf16", "recompute", "budget", "slots", "heads"),
    [
        (False, False, 0.065, 510, 4),
        (False, True, 0.045, 510, 4),
        (True, False, 0.045, 510, 4),
        (True, True, 0.04, 510, 4),
        (True, False, 0.12, 1534, 8),  # long enough for products, heads wider than the hidden state
        # Half a minute without bf16 instructions; both of its sides are tried above.
        pytest.param(True, True, 0.09, 1534, 8, marks=pytest.mark.slow),
    ],
)
def test_a_step_stays_within_its_budget_and_makes_use_of_it(bf16, recompute, budget, slots, heads):
    element, config = 2 if bf16 else 4, medium(heads)
    settings = {"slots": slots, "rollout": 8, "mtp_share": COD.mtp_share(), "element": element}
    limit = rows_within(budget, config, **settings, recompute=recompute)
    batch = batch_within(limit, slots)
    assert len(batch.segments) > 1, "the budget would not be the limit"
    share = peak_of_steps(batch, config, bf16=bf16, recompute=recompute) / (budget * 1e9)
    assert 0.75 < share <= 1
