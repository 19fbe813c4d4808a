"""Segments and accumulated gradients against one plain backward pass."""

import pytest
import torch
from random_parts import make_drafter, make_head, make_sample

from peagle.cod.sampling import Cod, expected_rows, sample_rows
from peagle.cod.segments import Segment, partition
from peagle.kernels.cpu.backend import Cpu
from peagle.kernels.grad_accumulation import MainGrads
from peagle.train.loss import head_loss
from peagle.train.objective import objective
from peagle.train.packing import Batch, pack

COD = Cod(6, 0.8)

DESIGNS = ["shared", "depth", "anchor", "anchor_depth", "anchor_scaled"]


def make_batch(lengths=(60, 25, 41), segments=None, dtype=torch.float64):
    slots = pack([make_sample(n, seed) for seed, n in enumerate(lengths)])
    slots["aux"], slots["final"] = slots["aux"].to(dtype), slots["final"].to(dtype)
    whole = (Segment(0, len(slots["tokens"])),)
    return Batch(**slots, segments=segments or whole, seed=0)


def draw(batch):
    generator = torch.Generator().manual_seed(batch.seed)
    return sample_rows(batch.supervised, batch.document, cod=COD, generator=generator)


BOTH = pytest.mark.parametrize("parallel", [True, False], ids=["p-eagle", "eagle3"])


def plain_loss(drafter, head, batch, rows, depth_decay=1.0):
    """No segments, no accumulation: ordinary autograd over all rows."""
    lengths = torch.bincount(batch.document).tolist()
    ntp = drafter.ntp_forward(batch.tokens, batch.aux, batch.position, document_lengths=lengths)
    deep = rows.depth > 0
    hidden = ntp.hidden[rows.anchor]
    hidden[deep] = drafter.mtp_forward(rows.mtp(), ntp, batch.position, batch.document, drafter.ops)
    logits = drafter.logits(hidden)
    p = torch.softmax(head(batch.final).double(), -1)[rows.position]
    weights = depth_decay ** rows.depth.double()
    return (weights * (p * (p.log() - torch.log_softmax(logits, -1))).sum(-1)).sum()


def gradients(loss, drafter):
    drafter.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in drafter.named_parameters()}


KINDS = [{"parallel_drafting": False}, *({"hidden_state": design} for design in DESIGNS)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: str(*kind.values()))
@pytest.mark.parametrize("depth_decay", [1.0, 0.8])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_accumulated_gradients_equal_ordinary_backward(kind, depth_decay, kernels):
    drafter, head, batch = make_drafter(**kind).eval(), make_head(), make_batch()
    drafter.kernels = kernels
    rows = draw(batch)
    wanted_loss = plain_loss(drafter, head, batch, rows, depth_decay)
    wanted = gradients(2 * wanted_loss / 7, drafter)
    outcome = objective(drafter, head, batch, rows, mix={"kl": 1.0}, depth_decay=depth_decay)
    assert outcome.weight == pytest.approx(sum(depth_decay**d for d in rows.depth.tolist()))
    got = gradients(2 * outcome.loss / 7, drafter)
    assert outcome.loss.item() == pytest.approx(wanted_loss.item(), rel=1e-6)
    for name, want in wanted.items():
        assert (got[name] - want).norm() <= 1e-6 * want.norm(), name


@pytest.mark.parametrize(
    ("count", "kind"),
    [
        (2, {}),
        (5, {"hidden_state": "anchor_depth"}),
        (5, {"parallel_drafting": False}),
        (16, {}),
        (16, {"parallel_drafting": False}),
    ],
    ids=str,
)
def test_segments_change_neither_loss_nor_gradients_in_float32(count, kind):
    drafter, head = make_drafter(**kind).float(), make_head()
    whole = make_batch(lengths=(160, 25, 41), dtype=torch.float32)
    expected = expected_rows(whole.supervised, whole.document, cod=COD)
    segments = partition(expected, max_rows=int(expected.sum() / count) + 4)
    assert 0.8 * count <= len(segments) <= count
    rows = draw(whole)
    once = objective(drafter, head, whole, rows, mix={"kl": 1.0})
    wanted = gradients(once.loss, drafter)
    parts = objective(drafter, head, whole._replace(segments=segments), rows, mix={"kl": 1.0})
    got = gradients(parts.loss, drafter)
    assert torch.equal(once.correct, parts.correct)
    for name, want in wanted.items():
        assert (got[name] - want).norm() <= 1e-5 * want.norm(), name


def test_segments_change_gradients_in_bfloat16_by_rounding_only():
    drafter, head = make_drafter().float(), make_head()
    with torch.no_grad():  # the weights of the other tests would amplify rounding without bound
        for parameter in drafter.parameters():
            parameter.mul_(0.3 if parameter.ndim == 2 else 1.0)
    whole = make_batch(lengths=(160, 25, 41), dtype=torch.bfloat16)
    expected = expected_rows(whole.supervised, whole.document, cod=COD)
    parts = whole._replace(segments=partition(expected, max_rows=int(expected.sum() / 16) + 4))
    assert len(parts.segments) >= 13
    rows, found = draw(whole), []
    for batch in (whole, parts):
        with torch.autocast("cpu", torch.bfloat16):
            loss = objective(drafter, head, batch, rows, mix={"kl": 1.0}).loss
        found.append(torch.cat([g.flatten() for g in gradients(loss, drafter).values()]))
    assert 0 < (found[1] - found[0]).norm() <= 2e-2 * found[0].norm()


def test_running_ntp_again_changes_nothing():
    drafter, head, batch = make_drafter(), make_head(), make_batch()
    rows = draw(batch)
    kept, again = (
        objective(drafter, head, batch, rows, mix={"kl": 1.0}, recompute=recompute)
        for recompute in (False, True)
    )
    wanted = gradients(kept.loss, drafter)
    for name, got in gradients(again.loss, drafter).items():
        assert torch.equal(got, wanted[name]), name


def test_every_parameter_gets_a_gradient_even_without_deep_rows():
    drafter, head, batch = make_drafter(), make_head(), make_batch(lengths=(20,))
    rows = sample_rows(batch.supervised, batch.document, cod=Cod(1), generator=None)
    got = gradients(objective(drafter, head, batch, rows, mix={"kl": 1.0}).loss, drafter)
    assert not got["mask_hidden"].any()
    assert got["fc.weight"].any()


def test_correct_marks_the_rows_whose_guess_is_the_label():
    drafter, head, batch = make_drafter(), make_head(), make_batch()
    rows = draw(batch)
    with torch.no_grad():
        outcome = objective(drafter, head, batch, rows, mix={"kl": 1.0})
    assert not outcome.loss.requires_grad
    assert 0 < outcome.correct.float().mean() < 0.5  # chance level, not nothing


def test_a_perfect_drafter_of_depth_zero_has_no_loss():
    """A drafter whose last state is the target's own agrees with it: shifts and heads line up."""
    drafter, head, batch = make_drafter(num_hidden_layers=1), make_head(), make_batch()
    rows = sample_rows(batch.supervised, batch.document, cod=Cod(1), generator=None)
    target = head(batch.final).double()
    loss, _ = head_loss(
        torch.nn.functional.rms_norm(batch.final, (32,), head.norm.double(), 1e-6),
        head.head.double(),
        target,
        torch.arange(len(target)),
        mix={"kl": 1.0},
        ops=drafter.ops,
    )
    assert loss.item() < 1e-6 * len(rows.anchor)
    assert objective(drafter, head, batch, rows, mix={"kl": 1.0}).loss.item() > 1.0


@pytest.mark.parametrize("rows", [5, 200])  # below and above what oneDNN is asked for
def test_autocast_does_not_round_the_targets_logits(rows):
    head = make_head()
    final = torch.randn(rows, len(head.norm))
    with torch.autocast("cpu", torch.bfloat16):
        found = head(final, Cpu())
    assert torch.allclose(found, head(final), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_segment_are_not_kept_beside_their_sums(monkeypatch):
    drafter, head, batch = make_drafter(), make_head(), make_batch()
    ordinary, sizes = torch.autograd.grad, []

    def watched(*args, **kwargs):
        found = ordinary(*args, **kwargs)
        sizes.extend(x.untyped_storage().nbytes() // x.itemsize for x in found if x is not None)
        return found

    monkeypatch.setattr(torch.autograd, "grad", watched)
    objective(drafter, head, batch, draw(batch), mix={"kl": 1.0})
    assert sizes and set(sizes) == {1}


def test_gradients_of_ntp_are_added_to_their_sums():
    document = torch.zeros(40, dtype=torch.long)
    rows = sample_rows(document == 0, document, cod=COD, generator=None).mtp()
    count = len(rows.anchor)
    inputs = [torch.randn(n, heads, 8) for n, heads in ((count, 4), *[(count, 2)] * 2)]
    ntp = [torch.randn(40, 2, 8, requires_grad=True) for _ in range(2)]
    plan, main_grads = Cpu().plan_mtp_attention(rows, document, value=ntp[1]), MainGrads(ntp)

    def found(ops):
        out = ops.mtp_attention(*inputs, *ntp, plan=plan)
        return torch.autograd.grad(out.square().sum(), ntp, allow_unused=True)

    assert found(Cpu(main_grads)) == (None, None)
    for one, other in zip(main_grads.sums, found(Cpu()), strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def test_a_segment_that_fails_leaves_gradients_as_they_are(monkeypatch):
    drafter, head, batch = make_drafter(), make_head(), make_batch()

    def fails(*_, **__):
        raise RuntimeError("as it is meant to")

    monkeypatch.setattr("peagle.train.objective.piece_loss", fails)
    with pytest.raises(RuntimeError, match="as it is meant to"):
        objective(drafter, head, batch, draw(batch), mix={"kl": 1.0})
    for weight in drafter.shared_parameters():
        (found,) = torch.autograd.grad(weight.sum(), weight)
        assert torch.equal(found, torch.ones_like(weight))
