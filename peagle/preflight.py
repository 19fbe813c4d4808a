"""Checks all that a run can know before its first long stage."""

import math
import re
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy
from torch.optim import Optimizer, SparseAdam

from peagle.capture.config import CaptureConfig
from peagle.capture.identity import wanted_manifest
from peagle.card.run_files import read_json
from peagle.decode.sliding_window import sliding_window_of_layers
from peagle.kernels.device import pick_device
from peagle.model.build import build_drafter
from peagle.model.checkpoint import read_checkpoint
from peagle.model.published import find_published
from peagle.model.restore import refuse_incomplete, refuse_other_target
from peagle.model.saved_drafter import load_drafter
from peagle.model.warm_start import refuse_unfit
from peagle.serve.export import refuse_foreign
from peagle.store.disk import require_disk, require_writable
from peagle.target.target import TargetSource
from peagle.train.metrics import logged_names
from peagle.train.module import PEagleModule
from peagle.train.optimizer import parameter_groups

CHECKPOINTS = 2  # the new one is written beside the old one
STATES = 3  # a weight, and what an optimizer keeps of it


def check_drafter(
    module: PEagleModule, target: TargetSource, config: CaptureConfig, run_dir: Path
) -> None:
    """Build drafter, optimizer and schedule without memory, as training will.

    Raises:
        ValueError: if the shape cannot be built, ``init_from`` is no drafter of it, an optimizer's
            setting is out of range, or there is no room for checkpoints.
    """
    with torch.device("meta"):
        drafter = build_drafter(module.drafter_config(wanted_manifest(target, config)))
        optimizer = module.optimizer(parameter_groups(drafter))
        check_optimizer(optimizer)
        check_schedule(module, optimizer)
    if module.init_from is not None:
        published = find_published(module.init_from)
        refuse_unfit(published, drafter)
        module.init_from = published.name  # on the Hub at this commit, also after a long capture
    weights = sum(parameter.numel() for parameter in drafter.parameters())
    require_disk(run_dir, CHECKPOINTS * STATES * weights * torch.float32.itemsize)


def checks_without_weights(config: Any, target: TargetSource) -> list[Callable[[], Any]]:
    """Each raises ``ValueError`` for what would end a fit."""
    run_dir = Path(config.run_dir)
    checks: list[Callable[[], Any]] = [
        partial(refuse_foreign_files, run_dir),
        partial(check_drafter, config.model, target, config.capture, run_dir),
    ]
    if config.trainer.limit_test_batches != 0:
        checks += [
            partial(check_decodable, target),
            partial(check_baseline, config.evaluation.baseline, target),
            config.data.test_batches,  # raises for prompts
        ]
    return checks


def check_optimizer(optimizer: Optimizer) -> None:
    """Raise ``ValueError`` for one that would fail at its first step, or change nothing."""
    if isinstance(optimizer, SparseAdam):
        raise ValueError(
            "SparseAdam takes sparse gradients only, and a drafter's are dense: give another "
            "model.optimizer, as torch.optim.AdamW"
        )
    rate = max(group["lr"] for group in optimizer.param_groups)
    if not 0 < rate < math.inf:
        raise ValueError(f"the optimizer's lr must be above 0 and finite, got {rate}")


def check_schedule(module: PEagleModule, optimizer: Optimizer) -> None:
    """Raise ``ValueError`` for a schedule that takes the number of steps for something else.

    ``ExponentialLR`` would multiply the rate by it in every step.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    remedy = "give one that is called with the optimizer and the number of steps, as LinearSchedule"
    try:
        schedule = module.lr_scheduler(optimizer, 1000)
        with warnings.catch_warnings(action="ignore"):  # no optimizer step comes before this one
            later = [schedule.get_last_lr(), schedule.step() or schedule.get_last_lr()]
    except TypeError as error:
        raise ValueError(f"model.lr_scheduler cannot be used ({error}): {remedy}") from error
    for found in later:
        if any(new > 1.001 * rate for new, rate in zip(found, rates, strict=True)):
            raise ValueError(
                f"model.lr_scheduler raises the learning rate from {rates[0]:g} to {found[0]:g}: "
                f"{remedy}"
            )


def check_decodable(target: TargetSource) -> None:
    """Raise ``ValueError`` for a target that ``test`` cannot decode exactly."""
    try:
        sliding_window_of_layers(target.skeleton())
    except ValueError as error:
        raise ValueError(
            f"{error}, and train with --trainer.limit_test_batches 0: fit then ends without `test` "
            "and the card"
        ) from error


def check_baseline(address: str | None, target: TargetSource) -> None:
    """Raise ``ValueError`` unless the other drafter that ``test`` measures can be loaded for it."""
    if address is not None:
        refuse_other_target(load_drafter(address).config, target.config())


def check_epochs(path: str | None, max_epochs: int | None) -> None:
    """Raise ``ValueError`` for a checkpoint in a file that is of a later epoch than the last."""
    if path is None or "://" in path or max_epochs in (None, -1):
        return
    checkpoint = read_checkpoint(path)
    refuse_incomplete(checkpoint)
    trained = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if trained > max_epochs:
        raise ValueError(
            f"{path} has trained {trained} epochs, and this run ends after {max_epochs}: raise "
            "--trainer.max_epochs"
        )


def refuse_foreign_files(run_dir: Path) -> None:
    """Raise ``ValueError`` before a fit would replace what no earlier fit has written."""
    refuse_foreign(run_dir / "drafter")
    config = run_dir / "config.yaml"
    if config.exists() and not config.read_bytes().startswith(b"# lightning"):
        raise ValueError(
            f"{config} was not written by a fit, which would replace it: move it out of the run's "
            "folder, or give another --run_dir"
        )


def require_writable_run(run_dir: Path) -> None:
    """Raise ``ValueError`` before a run whose results could not be kept."""
    for name in ("", "checkpoints", "metrics", "drafter", "card"):
        require_writable(run_dir / name)


def refuse_other_run(run_dir: Path, target: TargetSource) -> None:
    """Raise ``ValueError`` before a fit would replace the checkpoint of another target."""
    earlier = read_json(run_dir / "provenance.json").get("target") or {}
    fingerprint = earlier.get("fingerprint")
    if fingerprint is not None and fingerprint != target.fingerprint():
        raise ValueError(
            f"{run_dir} holds a run of another target ({earlier.get('name_or_path')}), which this "
            "one would replace: give another --run_dir"
        )


def require_gpu(accelerator: str) -> None:
    """Raise ``ValueError`` if a GPU is asked for and there is none."""
    if accelerator in ("gpu", "cuda") and pick_device("auto") == "cpu":
        raise ValueError(
            f"this configuration asks for a GPU (trainer.accelerator: {accelerator}) and there is "
            "none here: give --trainer.accelerator cpu --trainer.devices 1 "
            "--trainer.precision 32-true"
        )


def require_logger(trainer: Trainer) -> None:
    """Raise ``ValueError`` for a callback that has nowhere to log to."""
    for callback in [] if trainer.loggers else trainer.callbacks:
        if isinstance(callback, LearningRateMonitor | DeviceStatsMonitor):
            raise ValueError(
                f"{type(callback).__name__} needs a logger: leave out --trainer.logger false, "
                "or the callback"
            )


def require_logged(trainer: Trainer, num_depths: int) -> None:
    """Raise ``ValueError`` for a callback that watches or names what is never logged.

    Lightning says so after the first validation, and writes 0 into the names of checkpoints. What a
    callback of the user's own logs is not known, hence nothing is refused beside one.
    """
    known = logged_names(num_depths, validated=trainer.limit_val_batches != 0)
    for callback in trainer.callbacks:
        if type(callback).__module__.partition(".")[0] not in ("peagle", "lightning"):
            return
        known += getattr(callback, "logs", ()) if trainer.loggers else ()
    for callback in trainer.callbacks:
        wanted, counters = [getattr(callback, "monitor", None)], []
        if isinstance(callback, ModelCheckpoint):
            wanted += re.findall(r"{(.*?)[:}]", callback.filename or "")
            counters = ["epoch", "step"]
        for name in wanted:
            if name is not None and name not in [*known, *counters]:
                raise ValueError(
                    f"{type(callback).__name__} wants {name!r}, which is never logged: give one of "
                    f"{', '.join([*counters, *known])}"
                )


def refuse_barebones(barebones: bool) -> None:
    """Raise ``ValueError``: a run without checkpoints, logs and callbacks leaves nothing."""
    if barebones:
        raise ValueError(
            "trainer.barebones switches off what a run is made of, checkpoints, logs and "
            "callbacks: leave it out, and for a short trial give --trainer.fast_dev_run true"
        )


def refuse_swa(trainer: Trainer) -> None:
    """Raise ``ValueError`` for an average that copies the module with all that trains it."""
    if any(isinstance(callback, StochasticWeightAveraging) for callback in trainer.callbacks):
        raise ValueError(
            "StochasticWeightAveraging cannot average a drafter: give "
            "peagle.callbacks.average.AveragedWeights, or leave it out"
        )


def require_batches(trainer: Trainer) -> None:
    """Raise ``ValueError`` for optimizer steps of no batch, which Lightning lets pass."""
    if trainer.accumulate_grad_batches < 1:
        found = trainer.accumulate_grad_batches
        raise ValueError(f"trainer.accumulate_grad_batches must be at least 1, got {found}")


def require_clipping(trainer: Trainer) -> None:
    """Raise ``ValueError`` for a negative limit, which would turn every gradient around."""
    if trainer.gradient_clip_val is not None and trainer.gradient_clip_val < 0:
        found = trainer.gradient_clip_val
        raise ValueError(f"trainer.gradient_clip_val must not be negative, got {found}")


def require_training(trainer: Trainer) -> None:
    """Raise ``ValueError`` for a fit that would export a drafter that it has not trained."""
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        if getattr(trainer, name) == 0:
            raise ValueError(f"trainer.{name} is 0, and nothing would be trained: raise it")
    for timer in trainer.callbacks:
        if isinstance(timer, Timer) and timer.time_remaining() == 0:
            raise ValueError("trainer.max_time is 0, and nothing would be trained: raise it")


def refuse_strategy(trainer: Trainer) -> None:
    """Raise ``ValueError`` for a strategy under which a run would end badly.

    Processes that are forked or spawned from this one (``ddp_spawn``, ``ddp_notebook``) hand back
    no trained drafter. Strategies that cut weights or gradients into parts need every call to pass
    through ``forward``, and gradients that are whole before clipping.
    """
    strategy = trainer.strategy
    single = isinstance(strategy, SingleDeviceStrategy)
    ddp = isinstance(strategy, DDPStrategy) and not isinstance(strategy, DeepSpeedStrategy)
    if single or (ddp and strategy._start_method == "popen"):
        return
    name = getattr(strategy, "_start_method", type(strategy).__name__)
    raise ValueError(f"this strategy ({name}) cannot train a drafter: give --trainer.strategy ddp")


def check_trainer(trainer: Trainer) -> None:
    """Raise ``ValueError`` for settings under which any command would end badly."""
    refuse_strategy(trainer)
    refuse_swa(trainer)
    require_batches(trainer)
    require_clipping(trainer)
    require_logger(trainer)
