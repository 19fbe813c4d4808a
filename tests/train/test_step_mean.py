"""A row counts the same wherever it lies among the batches and ranks of an optimizer step."""

import multiprocessing

import pytest
import torch
from random_parts import make_drafter, make_head, make_sample
from short_fits import make_data, make_module, make_trainer
from two_ranks import ROWS, inputs_of, linear, one_step, outcome_of

from peagle.cod.sampling import Cod, sample_rows
from peagle.cod.segments import Segment
from peagle.train.objective import objective
from peagle.train.packing import Batch, pack
from peagle.train.prefetch import ReadAhead
from peagle.train.step_mean import StepMean, rescale


def outcome(drafter, head, *lengths, depth_decay=1.0):
    slots = pack([make_sample(n, seed=n) for n in lengths])
    slots["aux"], slots["final"] = slots["aux"].double(), slots["final"].double()
    batch = Batch(**slots, segments=(Segment(0, len(slots["tokens"])),), seed=0)
    keep_all = Cod(5, 1.0)
    rows = sample_rows(batch.supervised, batch.document, cod=keep_all, generator=None)
    return objective(drafter, head, batch, rows, mix={"kl": 1.0}, depth_decay=depth_decay)


def gradient(drafter):
    return torch.cat([p.grad.flatten() for p in drafter.parameters()])


@pytest.mark.parametrize("depth_decay", [1.0, 0.8])
@pytest.mark.parametrize("first_is_large", [True, False])
def test_batches_of_very_different_sizes_train_like_one_batch_of_all_rows(
    depth_decay, first_is_large
):
    drafter, head, mean = make_drafter(), make_head(), StepMean()
    large, small, empty = (70, 35), (13,), (4,)
    whole = outcome(drafter, head, *large, *small, depth_decay=depth_decay)
    (whole.loss / whole.weight).backward()
    wanted = gradient(drafter)
    drafter.zero_grad()
    parts = (large, small, empty) if first_is_large else (empty, small, large)
    for lengths in parts:
        part = outcome(drafter, head, *lengths, depth_decay=depth_decay)
        (mean.add(part) / len(parts)).backward()
    step = mean.finish()
    assert (gradient(drafter) - wanted).norm() > 0.1 * wanted.norm()
    rescale(drafter.parameters(), len(parts) * step.factor)
    assert (gradient(drafter) - wanted).norm() <= 1e-10 * wanted.norm()
    assert step.loss.item() == pytest.approx((whole.loss / whole.weight).item(), rel=1e-10)
    assert step.accuracy.item() == pytest.approx(whole.correct.double().mean().item())


def test_uneven_batches_on_two_ranks_train_like_one_batch_of_all_rows(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    ranks = [
        spawn.Process(target=one_step, args=(rank, tmp_path / "ranks", results)) for rank in (0, 1)
    ]
    for process in ranks:
        process.start()
    found = dict(results.get(timeout=200) for _ in ranks)
    for process in ranks:
        process.join(60)
    model = linear()
    every = [inputs_of(batch, rank) for batch in range(len(ROWS)) for rank in (0, 1)]
    whole = outcome_of(model, torch.cat(every))
    loss = whole.loss / whole.weight
    loss.backward()
    wanted = [*gradient(model).tolist(), loss.item(), whole.correct.double().mean().item()]
    assert found[0] == pytest.approx(wanted, rel=1e-10)
    assert found[1] == found[0]


def test_a_step_of_one_batch_is_divided_by_its_rows_and_nothing_else():
    mean, model = StepMean(), linear()
    only = outcome_of(model, inputs_of(1, 0))
    assert torch.equal(mean.add(only), only.loss * (1 / torch.tensor(46.0).double()))
    assert mean.finish().factor == 1


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_an_accumulated_fit_steps_like_one_with_longer_packs(random_store, tmp_path):
    """Three batches and the last two of an epoch: the same rows as in packs of their own."""

    def weights(**changes):
        torch.manual_seed(0)
        module = make_module(
            cod=Cod(4, 1.0), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), lr_scheduler=constant
        )
        trainer = make_trainer(tmp_path, -1, max_epochs=1, gradient_clip_val=0.5, **changes)
        data = make_data(random_store)
        chosen = batches[trainer.accumulate_grad_batches]
        data.train_dataloader = lambda: ReadAhead(batch_of, chosen, threads=0)
        trainer.fit(module, datamodule=data)
        assert trainer.global_step == 2
        return torch.cat([p.detach().flatten() for p in module.drafter.parameters()])

    samples = [make_sample(n, seed=n) for n in (40, 9, 17, 12, 30)]
    batches = {3: [[x] for x in samples], 1: [samples[:3], samples[3:]]}
    short, long = weights(accumulate_grad_batches=3), weights()
    assert (short - long).abs().max() <= 1e-5


def batch_of(samples):
    slots = pack(samples)
    return Batch(**slots, segments=(Segment(0, len(slots["tokens"])),), seed=0)


def constant(optimizer, steps):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
