"""Reading and writing checkpoints without a trainer; ``tests/faults`` does it with real kills."""

import resource
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningCLI
from paths import ROOT

import peagle.cli
from peagle.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint, tensor_bytes
from peagle.model.checkpoint import check_address, read_checkpoint

CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


class Payload:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return Path.touch, (self.witness,)


@pytest.mark.parametrize(
    "address",
    ["http://h/x.ckpt", "https://h/x", "HTTPS://h/x", "file:///etc/passwd", "memory://x", "s3://b/x",
     "hf://a/b::https://h/x", "simplecache::http://h/x", "zip://x::hf://a/b"],
)  # fmt: skip
def test_only_files_and_the_hub_hold_checkpoints(address):
    with pytest.raises(ValueError, match="read from files and hf:// only"):
        check_address(address)
    with pytest.raises(ValueError, match="read from files and hf:// only"):
        AtomicCheckpointIO().load_checkpoint(address, weights_only=False)


@pytest.mark.parametrize(
    "address", ["hf://a/b", "hf://a/b/last.ckpt", "hf://a/b@main/last.ckpt", "hf://a/last.ckpt@main",
                "hf://a/b/last.ckpt@", "hf://a/b/last.ckpt@main@main"],
)  # fmt: skip
def test_a_checkpoint_on_the_hub_is_named_with_its_revision(address):
    with pytest.raises(ValueError, match="hf://OWNER/NAME/FILE@REVISION"):
        check_address(address)


def test_a_checkpoint_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"checkpoint .*none\.ckpt does not exist"):
        read_checkpoint(str(tmp_path / "none.ckpt"))


def test_the_checkpoints_that_an_earlier_run_kept_are_named_to_a_new_one(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-40.ckpt").touch()
    settings = {"default_root_dir": tmp_path, "is_global_zero": True, "fast_dev_run": False}
    for step in (40, 0):
        assert capsys.readouterr().err == ""
        Checkpoint().on_train_start(Mock(spec=Trainer, global_step=step, **settings))
    assert "checkpoints keeps step-40.ckpt of an earlier run" in capsys.readouterr().err


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    path, witness = tmp_path / "x.ckpt", tmp_path / "witness"
    torch.save({"state_dict": {}, "x": Payload(witness)}, path)
    with pytest.raises(ValueError, match="holds more than tensors"):
        AtomicCheckpointIO().load_checkpoint(path, weights_only=False)
    assert not witness.exists()
    run, arguments = Payload(witness).__reduce__()  # what a pickle reader would call
    run(*arguments)
    assert witness.exists()


def test_what_is_saved_is_loaded_and_no_temporary_file_stays(tmp_path):
    path = tmp_path / "new/last.ckpt"
    content = {"a": torch.arange(5), "b": {"c": [1.5, "text", None, (2, True)]}}
    AtomicCheckpointIO().save_checkpoint(content, path)
    loaded = read_checkpoint(str(path))
    assert torch.equal(loaded["a"], content["a"]) and loaded["b"] == content["b"]
    assert [p.name for p in path.parent.iterdir()] == ["last.ckpt"]


def test_a_save_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"step": 1}, path)
    too_large = torch.empty(2**60, dtype=torch.uint8, device="meta")
    with pytest.raises(OSError, match=r"needs \d+\.\d MB, \d+\.\d MB are free; the previous"):
        AtomicCheckpointIO().save_checkpoint({"x": too_large}, path)
    assert read_checkpoint(str(path)) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_save_that_stops_in_the_middle_says_how_much_it_needs_at_least(tmp_path):
    """Plain data has no size before it is written."""
    path = tmp_path / "last.ckpt"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, hard))
    try:
        with pytest.raises(OSError, match=r"it needs 2\.0 MB, .*the previous checkpoint"):
            AtomicCheckpointIO().save_checkpoint({"x": "y" * 5_000_000}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_the_tensor_bytes_a_checkpoint_is_that_of_its_tensors():
    nested = {"a": torch.zeros(3), "b": [torch.zeros(2, dtype=torch.float64), {"c": 7}]}
    assert tensor_bytes(nested) == 3 * 4 + 2 * 8


def test_lightning_still_reads_hyper_parameters_by_the_hook_that_we_silence():
    assert callable(LightningCLI._parse_ckpt_path)
    assert peagle.cli.PEagleCLI._parse_ckpt_path is not LightningCLI._parse_ckpt_path


def test_what_is_no_checkpoint_of_fit_never_reaches_lightning(tmp_path):
    path = tmp_path / "x.ckpt"
    for content in ({"state_dict": {}}, [1, 2], torch.zeros(2)):
        torch.save(content, path)
        with pytest.raises(ValueError, match="not written by peagle's fit"):
            AtomicCheckpointIO().load_checkpoint(path)


def test_no_option_lets_a_checkpoint_be_read_as_code():
    assert all("weights_only" in hidden for hidden in peagle.cli.PEagleCLI.subcommands().values())


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_can_be_killed(path):
    trainer = yaml.safe_load(path.read_text())["trainer"]
    callbacks = [entry["class_path"] for entry in trainer["callbacks"]]
    plugins = [entry["class_path"] for entry in trainer["plugins"]]
    assert "peagle.callbacks.checkpoint.AtomicCheckpointIO" in plugins
    assert {
        "peagle.callbacks.checkpoint.Checkpoint",
        "peagle.callbacks.signals.StopOnSignal",
    } <= set(callbacks)
