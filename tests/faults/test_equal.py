"""However the work is cut, it is the same work: over segments, and over ranks."""

from itertools import pairwise

import pytest
import torch
import toy
from runs import finish, last, lines
from torch.nn.utils import clip_grad_norm_

from peagle.cod.sampling import Cod, sample_rows
from peagle.cod.segments import Segment
from peagle.model.initial_weights import initialise
from peagle.model.p_eagle import PEagleDrafter
from peagle.model.restore import saved_config
from peagle.store.reader import Store
from peagle.target.head import TargetHead
from peagle.target.layers import TargetLayers
from peagle.train.objective import objective
from peagle.train.optimizer import parameter_groups
from peagle.train.packing import Batch, pack
from peagle.train.schedule import LinearSchedule

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
STEPS = 13


@pytest.fixture(scope="module")
def head(store) -> TargetHead:
    return TargetHead.load(store / "target.safetensors", eps=1e-6, softcap=None)


@pytest.fixture
def drafter(reference) -> PEagleDrafter:
    torch.manual_seed(0)
    return PEagleDrafter(saved_config(last(reference)))


def batch_of(samples, segments: int) -> Batch:
    slots = pack(samples)
    bounds = torch.linspace(0, len(slots["tokens"]), segments + 1).long().tolist()
    return Batch(**slots, segments=tuple(Segment(a, b) for a, b in pairwise(bounds)), seed=0)


def gradients(drafter, head, batch, *, bf16: bool):
    drafter.zero_grad()
    generator = torch.Generator().manual_seed(3)
    rows = sample_rows(batch.supervised, batch.document, cod=Cod(4, 0.8), generator=generator)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        outcome = objective(drafter, head, batch, rows, mix={"kl": 1.0})
    (outcome.loss / len(rows.anchor)).backward()
    return torch.cat([p.grad.flatten() for p in drafter.parameters()])


@pytest.mark.parametrize(("bf16", "limit"), [(False, 1e-5), (True, 2e-2)])
def test_segments_change_the_gradient_by_rounding_only(store, head, drafter, tally, bf16, limit):
    initialise(drafter, head, torch.arange(toy.VOCABULARY), TargetLayers({}))
    samples = [toy.make_sample(number) for number in range(12)]
    whole = gradients(drafter, head, batch_of(samples, 1), bf16=bf16)
    problems = []
    for count in (2, 4, 8):
        cut = gradients(drafter, head, batch_of(samples, count), bf16=bf16)
        difference = float((cut - whole).norm() / whole.norm())
        problems.append("" if difference <= limit else f"{count} segments: {difference:.1e}")
    tally(f"2, 4, 8 segments, {'bf16' if bf16 else 'fp32'}", problems)


def samples_by_name(store) -> dict:
    """Samples under the name by which ``injections.Documents`` knows them."""
    names = {}
    for index, entry in enumerate(Store(store).entries):
        sample = toy.make_sample(int(entry.sample, 16))
        names[".".join(map(str, sample.input_ids[1:7].tolist()))] = sample
        assert entry.tokens == len(sample.input_ids), index
    assert len(names) == toy.SAMPLES
    return names


@pytest.mark.short
def test_two_ranks_with_unequal_segments_train_like_one_process(
    store, head, drafter, tmp_path, tally
):
    """One process repeats, in plain PyTorch, what the ranks did: same documents, one backward."""
    run_dir = tmp_path / "run"
    finish(
        run_dir,
        store,
        "--model.cod.keep_ratio=1",  # no draw, so that rows do not depend on the packing
        "--data.max_rows=40",
        "--trainer.max_epochs=1",
        ranks=2,
        every_n_steps=1,
        inject=[("Documents", {}), ("Segments", {})],
    )
    counts = [[int(n) for _, n in lines(run_dir / f"segments-{rank}.txt")] for rank in range(2)]
    unequal = sum(a != b for a, b in zip(*counts, strict=True))
    assert unequal >= 3, counts
    by_name = samples_by_name(store)
    seen = [lines(run_dir / f"documents-{rank}.txt") for rank in range(2)]
    first = {
        k.removeprefix("drafter."): v for k, v in last(run_dir, "step-1.ckpt")["state_dict"].items()
    }
    drafter.load_state_dict(first)
    saved = last(run_dir, "step-1.ckpt")
    optimizer = torch.optim.AdamW(parameter_groups(drafter), lr=1e-3, weight_decay=0.01)
    schedule = LinearSchedule(optimizer, STEPS, 0.1)
    optimizer.load_state_dict(saved["optimizer_states"][0])
    schedule.load_state_dict(saved["lr_schedulers"][0])
    for step in range(1, STEPS):
        documents = [by_name[name] for rank in range(2) for name in seen[rank][step][2:]]
        batch = batch_of(documents, 1)
        rows = sample_rows(
            batch.supervised, batch.document, cod=Cod(4, 1.0), generator=torch.Generator()
        )
        optimizer.zero_grad()
        loss = objective(drafter, head, batch, rows, mix={"kl": 1.0}).loss / len(rows.anchor)
        loss.backward()
        clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    final = last(run_dir)
    assert final["global_step"] == STEPS
    trained = {name: p.detach() for name, p in drafter.named_parameters()}
    moved = max(float((p - first[name]).abs().max()) for name, p in trained.items())
    worst = max(
        float((p - final["state_dict"][f"drafter.{name}"]).abs().max())
        for name, p in trained.items()
    )
    assert moved > 1e-3
    tally("two ranks, unequal segments, like one process", [
        "" if worst <= 1e-6 else f"weights differ by {worst:.1e}"
    ])  # fmt: skip
