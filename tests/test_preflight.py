"""What fit refuses before it captures anything."""

import json
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.loggers import CSVLogger
from short_fits import make_data, make_module, make_trainer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    ReduceLROnPlateau,
)
from transformers import DeepseekV3Config, Qwen3NextConfig

from peagle.callbacks.progress import Progress
from peagle.capture.config import CaptureConfig
from peagle.capture.identity import wanted_manifest
from peagle.capture.prompts import PromptSource
from peagle.model.build import build_drafter
from peagle.preflight import (
    check_baseline,
    check_decodable,
    check_drafter,
    check_epochs,
    refuse_barebones,
    refuse_foreign_files,
    refuse_other_run,
    refuse_strategy,
    refuse_swa,
    require_batches,
    require_clipping,
    require_logged,
    require_training,
    require_writable_run,
)
from peagle.serve.export import export_drafter
from peagle.target.target import TargetSource
from peagle.train.module import PEagleModule

CONFIG = CaptureConfig([PromptSource("stdlib")])
SHAPE = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("config", "why"),
    [(DeepseekV3Config(**SHAPE), r"latents \(MLA\)"), (Qwen3NextConfig(**SHAPE), "linear_attent")],
    ids=["latent", "linear"],
)
def test_a_target_that_test_cannot_decode_is_sent_to_bench(config, why, tmp_path):
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"{why}.*bench`, and train with --trainer.limit"):
        check_decodable(TargetSource(str(tmp_path)))


def test_the_embedded_target_can_be_decoded_and_its_skeleton_has_no_weights():
    check_decodable(TargetSource("tiny"))
    assert all(p.is_meta for p in TargetSource("tiny").skeleton().parameters())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"mask_token_id": 512}, r"mask_token_id must lie in 0\.\.511, got 512"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"num_key_value_heads": 2}, "num_key_value_heads must divide the 3 heads"),
        ({"hidden_size": 100}, "hidden_size must be a multiple of the 3 heads"),
        ({"intermediate_size": -1}, "intermediate_size must be at least 1, got -1"),
        ({"draft_vocab_size": 0}, "draft_vocab_size must be at least 1, got 0"),
        ({"lr_scheduler": ExponentialLR}, "lr_scheduler raises the learning rate from"),
        ({"lr_scheduler": CyclicLR}, "lr_scheduler (raises|cannot)"),
        ({"lr_scheduler": ReduceLROnPlateau}, r"lr_scheduler cannot be used"),
        ({"lr_scheduler": LambdaLR}, r"lr_scheduler cannot be used"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, lr=-1.0)}, "Invalid learning rate"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, lr=0.0)}, "lr must be above 0"),
        ({"optimizer": lambda p: torch.optim.AdamW(p, lr=float("inf"))}, "finite, got inf"),
        ({"optimizer": torch.optim.SparseAdam}, "SparseAdam takes sparse gradients only"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_drafter_that_cannot_be_trained_is_refused_before_its_store_is_made(
    tmp_path, settings, words
):
    check_drafter(PEagleModule(mask_token_id=3), TargetSource("tiny"), CONFIG, tmp_path / "run")
    with pytest.raises(ValueError, match=words):
        module = PEagleModule(**{"mask_token_id": 3, **settings})
        check_drafter(module, TargetSource("tiny"), CONFIG, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_drafter_to_start_from_is_compared_before_a_store_is_made(tmp_path, own_hub):
    target, settings = TargetSource("tiny"), {"mask_token_id": 3, "num_layers": 1}
    drafter = build_drafter(
        PEagleModule(**settings).drafter_config(wanted_manifest(target, CONFIG))
    )
    export_drafter(drafter, tmp_path / "drafter")
    files = {path.name: path.read_bytes() for path in (tmp_path / "drafter").iterdir()}
    commit = own_hub.put("alice/head", files)
    module = PEagleModule(**settings, init_from="alice/head")
    check_drafter(module, target, CONFIG, tmp_path / "run")
    assert module.init_from == f"hf://alice/head@{commit}"  # wherever the branch moves meanwhile
    with pytest.raises(ValueError, match=r"num_hidden_layers 1 there, 4 here: give --model.num_la"):
        module = PEagleModule(mask_token_id=3, init_from="alice/head")
        check_drafter(module, target, CONFIG, tmp_path / "run")


def test_a_schedule_by_the_number_of_steps_is_allowed(tmp_path):
    module = PEagleModule(mask_token_id=3, lr_scheduler=CosineAnnealingLR)
    check_drafter(module, TargetSource("tiny"), CONFIG, tmp_path)


def test_a_disk_without_room_for_checkpoints_is_found(monkeypatch, tmp_path):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10**6))
    with pytest.raises(ValueError, match="not enough disk"):
        check_drafter(PEagleModule(mask_token_id=3), TargetSource("tiny"), CONFIG, tmp_path)


def test_a_run_must_not_end_before_the_epoch_of_its_checkpoint(monkeypatch):
    loop = {"epoch_progress": {"current": {"processed": 3}}}
    checkpoint = {"loops": {"fit_loop": loop}}
    monkeypatch.setattr("peagle.preflight.read_checkpoint", lambda _: checkpoint)
    monkeypatch.setattr("peagle.preflight.refuse_incomplete", lambda _: None)
    check_epochs("last.ckpt", 3)
    with pytest.raises(ValueError, match=r"last.ckpt has trained 3 epochs.*ends after 1"):
        check_epochs("last.ckpt", 1)


def test_a_fit_refuses_the_folder_of_another_targets_run(tmp_path):
    target = TargetSource("tiny")
    record = {"target": {"fingerprint": target.fingerprint(), "name_or_path": "org/other"}}
    for fingerprint in (None, record["target"]["fingerprint"]):
        record["target"]["fingerprint"] = fingerprint
        (tmp_path / "provenance.json").write_text(json.dumps(record))
        refuse_other_run(tmp_path, target)
    record["target"]["fingerprint"] = "another"
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"holds a run of another target \(org/other\)"):
        refuse_other_run(tmp_path, target)


def test_a_fit_refuses_a_configuration_of_the_users_own_in_its_folder(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("# lightning.pytorch==2.6.6\nseed_everything: 0\n")
    refuse_foreign_files(tmp_path)
    path.write_text("# my recipe\nseed_everything: 0\n")
    with pytest.raises(ValueError, match=r"config\.yaml was not written by a fit"):
        refuse_foreign_files(tmp_path)


def trainer(strategy):
    return L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_a_strategy_that_starts_from_this_process_is_refused(strategy):
    with pytest.raises(ValueError, match=r"cannot train a drafter: give --trainer\.strategy ddp"):
        refuse_strategy(trainer(strategy))


def test_an_average_that_would_copy_all_that_trains_is_refused():
    averaging = L.Trainer(
        accelerator="cpu", devices=1, logger=False, callbacks=[StochasticWeightAveraging(0.1)]
    )
    with pytest.raises(ValueError, match=r"give peagle\.callbacks\.average\.AveragedWeights"):
        refuse_swa(averaging)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_ddp_is_allowed(strategy):
    refuse_strategy(trainer(strategy))


def test_one_device_is_allowed():
    refuse_strategy(L.Trainer(accelerator="cpu", devices=1, logger=False))


def test_optimizer_steps_of_no_batch_are_refused():
    with pytest.raises(ValueError, match="accumulate_grad_batches must be at least 1, got 0"):
        require_batches(L.Trainer(accelerator="cpu", logger=False, accumulate_grad_batches=0))


def test_a_run_that_could_not_be_kept_is_refused(tmp_path, monkeypatch):
    (tmp_path / "run" / "metrics").mkdir(parents=True)
    require_writable_run(tmp_path / "run")
    for name in ("metrics", ""):
        closed = str(tmp_path / "run" / name)
        monkeypatch.setattr("os.access", lambda path, _, closed=closed: str(path) != closed)
        with pytest.raises(ValueError, match=f"^{closed} cannot be written into: give another"):
            require_writable_run(tmp_path / "run")


def test_a_baseline_that_cannot_be_measured_is_refused(tmp_path, random_store):
    target, torn = TargetSource("tiny"), tmp_path / "torn.ckpt"
    torn.write_text("x")
    with pytest.raises(ValueError, match="is refused: it is torn"):
        check_baseline(str(torn), target)
    make_trainer(tmp_path, 1).fit(make_module(), datamodule=make_data(random_store))
    check_baseline(None, target)
    with pytest.raises(ValueError, match="trained for another target"):
        check_baseline(str(tmp_path / "checkpoints/last.ckpt"), target)


def test_a_negative_limit_of_gradients_is_refused():
    for limit in (None, 0, 1.0):
        require_clipping(L.Trainer(accelerator="cpu", logger=False, gradient_clip_val=limit))
    with pytest.raises(ValueError, match="gradient_clip_val must not be negative, got -1"):
        require_clipping(L.Trainer(accelerator="cpu", logger=False, gradient_clip_val=-1))


@pytest.mark.parametrize("name", ["max_steps", "max_epochs", "limit_train_batches"])
def test_a_fit_that_trains_nothing_is_refused(name):
    require_training(L.Trainer(accelerator="cpu", logger=False, **{name: 1}))
    with pytest.raises(ValueError, match=f"trainer.{name} is 0, and nothing would be trained"):
        require_training(L.Trainer(accelerator="cpu", logger=False, **{name: 0}))


def test_a_fit_without_time_is_refused():
    require_training(L.Trainer(accelerator="cpu", logger=False, max_time="00:00:00:01"))
    with pytest.raises(ValueError, match="max_time is 0, and nothing would be trained"):
        require_training(L.Trainer(accelerator="cpu", logger=False, max_time="00:00:00:00"))


def watching(*callbacks, **settings):
    settings = {"logger": CSVLogger("unused"), **settings}
    require_logged(L.Trainer(accelerator="cpu", callbacks=list(callbacks), **settings), 2)


@pytest.mark.parametrize(
    ("callback", "settings"),
    [
        (EarlyStopping("val_loss"), {}),
        (ModelCheckpoint(monitor="val/accuracy_d2"), {}),
        (ModelCheckpoint(filename="{epoch}-{val_loss:.2f}"), {}),
        (EarlyStopping("epoch"), {}),
        (EarlyStopping("val/loss"), {"limit_val_batches": 0}),
        (EarlyStopping("train/lr"), {"logger": False}),
    ],
)
def test_a_callback_that_wants_what_is_never_logged_is_refused(callback, settings):
    with pytest.raises(ValueError, match=r"never logged: give one of .*train/loss, train/accuracy"):
        watching(Progress(), callback, **settings)


def test_a_callback_that_wants_what_is_logged_is_allowed():
    watching(
        Progress(),
        EarlyStopping("val/accuracy_d1"),
        EarlyStopping("train/lr"),
        ModelCheckpoint(monitor="step", filename="{epoch}-{val/loss:.2f}", mode="max"),
    )


def test_what_a_callback_of_the_users_own_logs_is_not_known():
    class Own(L.Callback):
        pass

    watching(Own(), EarlyStopping("own/figure"))


def test_a_run_of_nothing_but_steps_is_refused():
    refuse_barebones(False)
    with pytest.raises(ValueError, match=r"barebones switches off .*fast_dev_run true"):
        refuse_barebones(True)
