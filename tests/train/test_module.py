"""Lightning around the numeric core: short runs on a store of random hidden states."""

import hashlib

import lightning as L
import pytest
import torch
from random_parts import make_target
from short_fits import BASELINE, Losses, make_data, make_module, make_trainer

from peagle.callbacks.checkpoint import Checkpoint
from peagle.model.saved_drafter import load_drafter
from peagle.serve.contract import as_served
from peagle.serve.export import Verifier, export_drafter
from peagle.target.layers import target_layers_of
from peagle.train.schedule import LinearSchedule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    ("changes", "left"),
    [({}, 0.8), (BASELINE, 0.9)],  # rows that read tokens at random take longer
    ids=["p-eagle", "eagle3"],
)
def test_twenty_steps_lower_the_loss(random_store, tmp_path, precision, changes, left):
    losses = Losses()
    trainer = make_trainer(
        tmp_path,
        20,
        precision=precision,
        gradient_clip_val=1.0,
        callbacks=[losses, Checkpoint(every_n_steps=100)],
    )
    trainer.fit(make_module(**changes), datamodule=make_data(random_store))
    assert len(losses.values) == 20
    assert sum(losses.values[-4:]) < left * sum(losses.values[:4])


def test_a_checkpoint_brings_back_the_drafter_and_refuses_another_architecture(
    random_store, tmp_path
):
    module = make_module()
    make_trainer(tmp_path, 3).fit(module, datamodule=make_data(random_store))
    last = tmp_path / "checkpoints" / "last.ckpt"
    drafter = load_drafter(last)
    for name, tensor in module.drafter.state_dict().items():
        assert torch.equal(tensor, drafter.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"num_hidden_layers: checkpoint 2, this run 3"):
        make_trainer(tmp_path, 5).fit(
            make_module(num_layers=3),
            datamodule=make_data(random_store),
            ckpt_path=str(last),
            weights_only=True,
        )


@pytest.mark.parametrize(
    ("trained", "given", "words"),
    [
        (
            {},
            BASELINE,
            "holds a drafter of kind p-eagle, this run has eagle3: give --model.drafter",
        ),
        (
            BASELINE,
            {"num_layers": 1},
            "kind eagle3, this run has p-eagle: .* --model.drafter eagle3",
        ),
    ],
    ids=["p-eagle", "eagle3"],
)
def test_a_checkpoint_of_the_other_kind_is_refused(random_store, tmp_path, trained, given, words):
    module = make_module(**trained)
    make_trainer(tmp_path, 1).fit(module, datamodule=make_data(random_store))
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert type(load_drafter(last)) is type(module.drafter)
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, 2).fit(
            make_module(**given),
            datamodule=make_data(random_store),
            ckpt_path=str(last),
            weights_only=True,
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mask_token_id": None}, "a p-eagle drafter needs mask_token_id"),
        ({"depth_decay": 0.0}, r"depth_decay must lie in \(0, 1\], got 0"),
        ({"depth_decay": 1.1}, "depth_decay must lie in"),
    ],
)
def test_a_model_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make_module(**changes)


def test_validation_counts_every_supervised_row_of_every_depth(random_store, tmp_path):
    module, data = make_module(), make_data(random_store)
    trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0)
    trainer.fit(module, datamodule=data)
    trainer.validate(module, datamodule=data, verbose=False)
    report = module.depths.compute()
    lengths = [data.store.entries[i].tokens for i in data.store.split("val")]
    # Prompt of 3: tokens 3.. are the assistant's; slots 2..n-3 are supervised.
    runs = [n - 4 for n in lengths]
    assert report.count == [sum(max(0, run - depth) for run in runs) for depth in range(4)]


def test_a_pruned_vocabulary_is_chosen_from_the_store_and_kept_in_the_checkpoint(
    random_store, tmp_path
):
    module = make_module(draft_vocab_size=20)
    make_trainer(tmp_path, 2).fit(module, datamodule=make_data(random_store))
    drafter = load_drafter(tmp_path / "checkpoints" / "last.ckpt")
    kept = torch.arange(20) + drafter.d2t
    counts = make_data(random_store)
    counts.setup("fit")
    wanted = counts.assistant_tokens().argsort(descending=True, stable=True)[:20].sort().values
    assert torch.equal(kept, wanted)
    assert torch.equal(drafter.t2d.nonzero().flatten(), kept)
    assert len(module.target_head.head) == 20


def test_frozen_embeddings_stay_the_targets(random_store, tmp_path):
    module = make_module(train_embeddings=False)
    make_trainer(tmp_path, 2).fit(module, datamodule=make_data(random_store))
    assert torch.equal(module.drafter.embed_tokens.weight, module.full_head[0].embedding.float())


@pytest.mark.parametrize("start", ["target", "random"])
def test_a_random_start_copies_no_layer_of_the_target(random_store, tmp_path, start):
    target = make_target()
    layers = target_layers_of(target, target.config, (0, 3))
    layers.save(random_store / "target_layers.safetensors")
    module = make_module(num_layers=3, num_key_value_heads=4, start=start)
    trainer = make_trainer(tmp_path, 1, limit_train_batches=0)
    trainer.fit(module, datamodule=make_data(random_store))
    ours = module.drafter.layers[2].mlp.up_proj.weight
    copied = torch.allclose(ours, layers.layers[3]["mlp.up_proj.weight"].float())
    assert copied == (start == "target")
    assert torch.equal(module.drafter.embed_tokens.weight, module.full_head[0].embedding.float())


@pytest.mark.parametrize("changes", [{"draft_vocab_size": 20}, BASELINE], ids=["p-eagle", "eagle3"])
def test_a_fit_goes_on_where_the_drafter_that_it_starts_from_stood(
    random_store, tmp_path, changes, capsys
):
    def validation_loss(module):
        trainer = make_trainer(tmp_path, 1, limit_val_batches=1.0, callbacks=[])
        trainer.validate(module, datamodule=make_data(random_store), verbose=False)
        return float(trainer.callback_metrics["val/loss"])

    trained = make_module(**changes)
    make_trainer(tmp_path, 6, callbacks=[]).fit(trained, datamodule=make_data(random_store))
    folder, verifier = tmp_path / "drafter", Verifier("o/t", ["LlamaForCausalLM"])
    losses = []
    for layout, named in (("eagle3", None), ("speculators", verifier)):
        export_drafter(trained.drafter, folder, layout=layout, verifier=named)
        module = make_module(**changes, init_from=str(folder))
        losses.append(validation_loss(module))
        weights = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
        assert module.started_from == {"drafter": str(folder), "weights_sha256": weights}
        assert f"the drafter starts from {folder}\n" in capsys.readouterr().out
    as_served(trained.drafter, torch.float32)
    assert losses == pytest.approx(2 * [validation_loss(trained)], rel=1e-6)
    assert validation_loss(make_module(**changes)) > 1.01 * losses[0]


@pytest.mark.parametrize("design", ["depth", "anchor", "anchor_depth", "anchor_scaled"])
def test_every_hidden_state_learns_and_comes_back_from_its_checkpoint(
    random_store, tmp_path, design
):
    module, before = make_module(hidden_state=design), {}

    class Before(L.Callback):
        def on_train_start(self, trainer, pl_module):
            before.update({n: p.clone() for n, p in pl_module.drafter.named_parameters()})

    callbacks = [Before(), Checkpoint(every_n_steps=10)]
    trainer = make_trainer(tmp_path, 3, callbacks=callbacks)
    trainer.fit(module, datamodule=make_data(random_store))
    drafter = load_drafter(tmp_path / "checkpoints" / "last.ckpt")
    added = [name for name in before if name.startswith("row_states.")]
    assert len(added) == {"depth": 1, "anchor": 1, "anchor_depth": 2, "anchor_scaled": 2}[design]
    for name in added:
        assert not torch.equal(before[name], drafter.get_parameter(name)), name
        assert torch.equal(module.drafter.get_parameter(name), drafter.get_parameter(name)), name


def test_a_hidden_state_for_rows_of_another_kind_of_drafter_is_refused():
    with pytest.raises(ValueError, match="hidden_state is for p-eagle drafters"):
        make_module(drafter="eagle3", hidden_state="depth")


def test_accumulated_steps_equal_lightnings_mean_of_their_gradients(random_store, tmp_path):
    trainer = make_trainer(tmp_path, 3, accumulate_grad_batches=2)
    trainer.fit(make_module(), datamodule=make_data(random_store))
    assert trainer.global_step == 3
    assert trainer.fit_loop.epoch_loop.batch_progress.total.completed == 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"max_tokens": 5}, "max_tokens = 5 is smaller than each"),
        ({"max_rows": 2}, "max_rows"),
        ({"max_rows": None, "memory_gb": 0.0001}, "cannot hold one segment of 64 slots: give at"),
        ({"max_rows": 200, "memory_gb": 0.0001}, "cannot hold one segment of 64 slots: give at"),
    ],
)
def test_settings_that_fit_no_sample_are_refused(random_store, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path, 2).fit(make_module(), datamodule=make_data(random_store, **changes))


def test_a_drafter_is_built_on_the_cpu_whatever_device_lightning_prefers(random_store, tmp_path):
    class Elsewhere(L.Callback):
        def setup(self, trainer, pl_module, stage):
            with torch.device("meta"):  # as Lightning does with a GPU
                pl_module.configure_model()

    module = make_module(draft_vocab_size=20)
    trainer = make_trainer(tmp_path, 1, callbacks=[Elsewhere()])
    trainer.fit(module, datamodule=make_data(random_store))
    tensors = [*module.drafter.parameters(), *module.drafter.buffers()]
    assert all(tensor.device.type == "cpu" for tensor in tensors)


def test_a_run_without_an_end_is_refused(random_store, tmp_path):
    with pytest.raises(ValueError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        make_trainer(tmp_path, -1, max_epochs=-1).fit(
            make_module(), datamodule=make_data(random_store)
        )


def test_random_embeddings_of_another_width_cannot_be_frozen(random_store, tmp_path):
    module = make_module(train_embeddings=False, hidden_size=16)
    with pytest.raises(ValueError, match="a drafter of width 16 cannot take those of width 32"):
        make_trainer(tmp_path, 2).fit(module, datamodule=make_data(random_store))


def test_a_memory_budget_decides_the_rows_per_segment(random_store, tmp_path):
    data = make_data(random_store, max_rows=None, memory_gb=0.3)
    make_trainer(tmp_path, 1).fit(make_module(), datamodule=data)
    allowed = data.segment_rows()
    assert allowed > 1000
    for data.max_rows in (200, allowed + 1):  # given both, both hold
        assert data.segment_rows() == min(data.max_rows, allowed)


def test_the_schedule_warms_up_and_decays_by_step():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = LinearSchedule(optimizer, 10, warmup_ratio=0.2)
    rates = []
    for _ in range(11):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.5, 1, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8, 0])
