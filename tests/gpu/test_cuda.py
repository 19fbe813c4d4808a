"""The training core on a GPU against float64 on the CPU, and whole runs there."""

import pytest
import torch
from loss_mixes import MIXES
from random_parts import make_drafter, make_head, make_sample
from short_fits import BASELINE, Losses, make_data, make_module, make_trainer
from torch._dynamo.utils import counters

from peagle.callbacks.checkpoint import Checkpoint
from peagle.cod.sampling import Cod, expected_rows, sample_rows
from peagle.cod.segments import partition
from peagle.kernels.cpu.backend import Cpu
from peagle.kernels.cuda.backend import Cuda
from peagle.model.saved_drafter import load_drafter
from peagle.train.loss import head_loss
from peagle.train.objective import objective
from peagle.train.packing import Batch, pack

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]
COD = Cod(6, 0.8)
ON_CPU = ("document", "supervised")


def batch_of(*lengths, count=4):
    """Documents in about ``count`` segments."""
    slots = pack([make_sample(n, seed) for seed, n in enumerate(lengths)])
    expected = expected_rows(slots["supervised"], slots["document"], cod=COD)
    limit = int(expected.sum() / count) + COD.num_depths
    return Batch(**slots, segments=partition(expected, max_rows=limit), seed=0)


def there(batch):
    tensors = {k: v for k, v in batch._asdict().items() if isinstance(v, torch.Tensor)}
    return batch._replace(**{k: v.cuda() for k, v in tensors.items() if k not in ON_CPU})


def drafter_of(**changes):
    drafter = make_drafter(head_dim=32, **changes)
    with torch.no_grad():  # larger weights would amplify rounding without bound
        for parameter in drafter.parameters():
            parameter.mul_(0.3 if parameter.ndim == 2 else 1.0)
    return drafter


def gradients(drafter, head, batch, **options):
    drafter.zero_grad()
    rows = sample_rows(
        batch.supervised,
        batch.document,
        cod=COD,
        generator=torch.Generator().manual_seed(batch.seed),
    )
    outcome = objective(drafter, head, batch, rows, mix={"kl": 1.0}, **options)
    outcome.loss.backward()
    return outcome, {
        name: p.grad.to("cpu", torch.float64, copy=True) for name, p in drafter.named_parameters()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"draft_vocab_size": 20, "fc_norm": True},
        {"hidden_state": "anchor_depth"},
        {"parallel_drafting": False},
    ],
    ids=str,
)
def test_gradients_are_those_of_float64_on_the_cpu(dtype, kind):
    drafter, head, batch = drafter_of(**kind), make_head(), batch_of(300, 25, 141)
    if drafter.config.pruned:
        head = head.restricted(drafter.target_ids(torch.arange(20)))
    exact = batch._replace(aux=batch.aux.double(), final=batch.final.double())
    wanted_outcome, wanted = gradients(drafter, head, exact)
    drafter, head = drafter.float().cuda(), head.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
        outcome, got = gradients(drafter, head, there(batch), recompute=dtype == torch.float32)
    # FlexAttention multiplies float32 as tf32.
    near, ties = (2e-3, 0.01) if dtype == torch.float32 else (5e-2, 0.1)
    assert len(batch.segments) >= 3
    assert outcome.loss.item() == pytest.approx(wanted_outcome.loss.item(), rel=near)
    assert (outcome.correct.cpu() != wanted_outcome.correct).float().mean() <= ties
    for name, want in wanted.items():
        assert (got[name] - want).norm() <= near * want.norm(), name


def test_nothing_is_compiled_again_for_other_lengths():
    drafter, head = drafter_of().float().cuda(), make_head().cuda()
    with torch.autocast("cuda", torch.bfloat16):
        for lengths in ((900, 25), (300,)):  # with one block of rows, and with more
            gradients(drafter, head, there(batch_of(*lengths)))
        made = dict(counters["stats"])
        for lengths in ((77, 690, 31), (1000,), (500, 210)):
            _, found = gradients(drafter, head, there(batch_of(*lengths)))
            assert all(grad.isfinite().all() for grad in found.values())  # nor is there a NaN
    assert made["unique_graphs"] > 0
    assert counters["stats"]["unique_graphs"] == made["unique_graphs"]


def attention_inputs(rows, slots, heads=4, groups=2, width=64):
    shapes = [(rows, heads), (rows, groups), (rows, groups), (slots, groups), (slots, groups)]
    return [torch.randn(*shape, width) for shape in shapes]


def near_float64(on_gpu, on_cpu, inputs, dtype, near):
    """Values and gradients."""
    there = [x.to("cuda", dtype).requires_grad_() for x in inputs]
    exact = [x.detach().cpu().double().requires_grad_() for x in there]
    got, want = on_gpu(*there), on_cpu(*exact)
    assert got.dtype == dtype and (got.cpu() - want).norm() <= near * want.norm()
    onward = torch.randn_like(got)
    found = torch.autograd.grad(got, there, onward)
    wanted = torch.autograd.grad(want, exact, onward.cpu().double())
    for one, other in zip(found, wanted, strict=True):
        assert (one.cpu() - other).norm() <= near * other.norm()


@pytest.mark.parametrize(("lengths", "tiles"), [((3300,), 3), ((1500, 40, 2600), 2)])
def test_long_documents_are_attended_in_shared_tiles(lengths, tiles):
    document = torch.repeat_interleave(torch.tensor(lengths))
    supervised = torch.ones(len(document), dtype=torch.bool)
    rows = sample_rows(supervised, document, cod=COD, generator=None).mtp()
    inputs = attention_inputs(len(rows.anchor), len(document))
    value = inputs[4]
    plan = Cuda().plan_mtp_attention(rows, document, value=value.to("cuda", torch.bfloat16))
    tiling = Cpu().plan_mtp_attention(rows, document, value=value)
    assert (len(plan.shared) >= tiles) == (torch.cuda.get_device_capability() >= (9, 0))
    near_float64(
        lambda *x: Cuda().mtp_attention(*x, plan=plan),
        lambda *x: Cpu().mtp_attention(*x, plan=tiling),
        inputs,
        torch.bfloat16,
        1e-2,
    )


@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_ntp_is_attended_by_the_kernel_for_each_length(dtype, near):
    lengths = [2500, 130, 1, 700]
    query, _, _, *pairs = attention_inputs(sum(lengths), sum(lengths))
    near_float64(
        lambda *x: Cuda().ntp_attention(*x, document_lengths=lengths),
        lambda *x: Cpu().ntp_attention(*x, document_lengths=lengths),
        [query, *pairs],
        dtype,
        near,
    )


@pytest.mark.parametrize("mix", MIXES, ids=lambda mix: "+".join(mix))
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_every_loss_is_that_of_float64_on_the_cpu(mix, weighted, monkeypatch):
    monkeypatch.setattr(Cuda, "head_chunk", 200)
    # Wider than the kernels' blocks, and a target whose logits rise from block to block.
    hidden, weight, target = (torch.randn(n, w) for n, w in ((500, 64), (5000, 64), (120, 5000)))
    target[:60] += torch.linspace(-20, 20, 5000)
    weight, position = weight / 8, torch.randint(120, (500,))
    weights = torch.rand(500) if weighted else None

    def found(*tensors):
        h, w, t, share = tensors
        h, w = h.clone().requires_grad_(), w.clone().requires_grad_()
        ops = Cuda() if h.is_cuda else Cpu()
        loss, guess = head_loss(h, w, t, position, mix=mix, weights=share, ops=ops)
        grads = torch.autograd.grad(loss, (h, w))
        return loss.item(), guess.cpu(), *(grad.double().cpu() for grad in grads)

    inputs = (hidden, weight, target, weights)
    loss, guess, *wanted = found(*(None if x is None else x.double() for x in inputs))
    got_loss, got_guess, *got = found(*(None if x is None else x.cuda() for x in inputs))
    assert got_loss == pytest.approx(loss, rel=1e-5)
    assert (guess != got_guess).sum() <= 1  # a near tie
    for one, other in zip(got, wanted, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm()


def test_products_of_bf16_are_added_to_float32_without_rounding():
    a, b = torch.randn(300, 64, device="cuda").bfloat16().T, torch.randn(300, 96, device="cuda")
    total = torch.randn(64, 96, device="cuda")
    wanted = total.double() + a.double() @ b.bfloat16().double()
    Cuda().add_product(total, a, b.bfloat16())
    assert (total - wanted).norm() <= 1e-6 * wanted.norm()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("changes", [{}, BASELINE], ids=["p-eagle", "eagle3"])
def test_a_run_on_the_gpu_lowers_the_loss_and_leaves_a_drafter(
    random_store, tmp_path, precision, changes
):
    losses = Losses()
    trainer = make_trainer(
        tmp_path,
        24,
        accelerator="gpu",
        devices=1,
        precision=precision,
        gradient_clip_val=1.0,
        accumulate_grad_batches=2,
        limit_val_batches=1.0,
        callbacks=[losses, Checkpoint(every_n_steps=10)],
    )
    data = make_data(random_store, num_workers=2)
    trainer.fit(make_module(**changes), datamodule=data)
    assert sum(losses.values[-4:]) < 0.9 * sum(losses.values[:4])
    assert load_drafter(tmp_path / "checkpoints" / "last.ckpt") is not None
