"""Averaged weights through training, checkpoints, resuming and interruption."""

import lightning as L
import pytest
import torch
from short_fits import make_data, make_module, make_trainer
from torch.optim import AdamW

from peagle.callbacks.average import AveragedWeights
from peagle.callbacks.checkpoint import Checkpoint
from peagle.model.checkpoint import read_checkpoint
from peagle.model.saved_drafter import load_drafter

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
NAME = "drafter.fc.weight"


class Steps(L.Callback):
    """The weights after every step, as trained."""

    def __init__(self):
        self.weights = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(pl_module.get_parameter(NAME).detach().clone())


class Parsed:
    """What the command line puts into the module refers to things that cannot be copied."""

    def __call__(self, parameters):
        return AdamW(parameters, lr=3e-3)

    def __deepcopy__(self, memo):
        raise TypeError("not copyable")


class Stop(L.Callback):
    def __init__(self, batch):
        self.batch = batch

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, loader=0):
        if batch_idx == self.batch:
            raise KeyboardInterrupt


def average(weights, decay):
    mean = weights[0]
    for weight in weights[1:]:
        mean = decay * mean + (1 - decay) * weight
    return mean


def train(folder, store, steps, *callbacks, ckpt_path=None, start_step=0, **changes):
    torch.manual_seed(0)
    module = make_module(draft_vocab_size=20, optimizer=Parsed())
    chosen = [
        AveragedWeights(decay=0.6, start_step=start_step),
        *callbacks,
        Checkpoint(every_n_steps=4),
    ]
    trainer = make_trainer(folder, steps, callbacks=chosen, **changes)
    trainer.fit(module, datamodule=make_data(store), ckpt_path=ckpt_path, weights_only=True)
    return module


def test_the_module_the_checkpoint_and_the_export_hold_the_average(random_store, tmp_path):
    steps = Steps()
    module = train(tmp_path, random_store, 6, steps)
    expected = average(steps.weights, 0.6)
    assert len(steps.weights) == 6 and not torch.allclose(expected, steps.weights[-1])
    assert torch.allclose(module.get_parameter(NAME), expected, atol=1e-6)
    drafter = load_drafter(tmp_path / "checkpoints" / "last.ckpt")
    assert torch.allclose(drafter.fc.weight, expected, atol=1e-6)
    # The map of a pruned vocabulary is no average of anything.
    assert torch.equal(drafter.t2d.nonzero().flatten(), torch.arange(20) + drafter.d2t)


def test_until_an_average_begins_the_weights_themselves_are_saved(random_store, tmp_path):
    steps = Steps()
    module = train(tmp_path, random_store, 6, steps, start_step=1000)
    assert torch.equal(module.get_parameter(NAME), steps.weights[-1])
    drafter = load_drafter(tmp_path / "checkpoints" / "last.ckpt")
    assert torch.equal(drafter.fc.weight, steps.weights[-1])


def test_a_resumed_run_equals_an_uninterrupted_one(random_store, tmp_path):
    whole, steps = train(tmp_path / "whole", random_store, 6), Steps()
    last = tmp_path / "parts" / "checkpoints" / "last.ckpt"
    kept = last.with_name("kept.ckpt")

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 5:
                last.rename(kept)  # as a kill in the sixth step would leave it: of step 4

    train(tmp_path / "parts", random_store, 6, Keep())
    assert read_checkpoint(str(kept))["global_step"] == 4
    resumed = train(tmp_path / "parts", random_store, 6, steps, ckpt_path=str(kept))
    assert len(steps.weights) == 2
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_run_that_no_longer_averages_says_so(random_store, tmp_path, capsys):
    train(tmp_path, random_store, 2)
    last = str(tmp_path / "checkpoints" / "last.ckpt")
    for callback, said in ((AveragedWeights(), False), (Checkpoint(), True)):
        trainer = make_trainer(tmp_path, 2, callbacks=[callback])
        trainer.fit(
            make_module(draft_vocab_size=20), datamodule=make_data(random_store), ckpt_path=last,
            weights_only=True,
        )  # fmt: skip
        assert ("holds averaged weights, and this run" in capsys.readouterr().out) is said


def test_a_finished_run_that_is_fitted_again_holds_the_average(random_store, tmp_path):
    before = train(tmp_path, random_store, 4)
    last = tmp_path / "checkpoints" / "last.ckpt"
    again = train(tmp_path, random_store, 4, ckpt_path=str(last))
    assert torch.equal(before.get_parameter(NAME), again.get_parameter(NAME))
    saved = read_checkpoint(str(last))
    assert torch.equal(saved["state_dict"][NAME], again.get_parameter(NAME))
    assert not torch.allclose(saved["current_model_state"][NAME], saved["state_dict"][NAME])


def test_an_interrupted_validation_saves_each_weight_in_its_place(random_store, tmp_path):
    steps, changes = Steps(), {"limit_val_batches": 1.0, "val_check_interval": 3}
    with pytest.raises(SystemExit):
        train(tmp_path, random_store, 9, steps, Stop(0), **changes)
    saved = read_checkpoint(str(tmp_path / "checkpoints" / "last.ckpt"))
    assert saved["global_step"] == len(steps.weights) == 3
    assert torch.allclose(saved["state_dict"][NAME], average(steps.weights, 0.6), atol=1e-6)
    assert torch.equal(saved["current_model_state"][NAME], steps.weights[-1])


def test_a_decay_that_never_forgets_is_refused():
    with pytest.raises(ValueError, match=r"decay must lie in \[0, 1\), got 1"):
        AveragedWeights(decay=1.0)
