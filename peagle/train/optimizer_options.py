"""On resume the run's own learning rate and other options count, not the checkpoint's."""

import inspect
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """What the configuration says about each parameter group."""
    return [
        {key: value for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]


def schedule_options_of(scheduler: LRScheduler) -> dict[str, Any]:
    """What the configuration says about the schedule: the arguments that it keeps by their names.

    A scheduler saves them together with its place, ``last_epoch``, which is the checkpoint's.
    """
    arguments = inspect.signature(type(scheduler)).parameters.keys() - {"optimizer", "last_epoch"}
    return {key: value for key, value in scheduler.state_dict().items() if key in arguments}


def impose_schedule(configured: dict[str, Any], scheduler: LRScheduler) -> None:
    """Put the configured options back into a restored scheduler."""
    vars(scheduler).update(configured)


def impose(configured: list[dict[str, Any]], optimizer: Optimizer, scheduler: LRScheduler) -> None:
    """Put the configured options back into a restored optimizer and its scheduler.

    The schedule keeps its place: a learning rate that was changed by a factor is changed by that
    factor at the present step. Nothing changes, to the bit, if nothing was changed.
    """
    for group, options in zip(optimizer.param_groups, configured, strict=True):
        old, new = group["initial_lr"], options["lr"]
        present = group["lr"] if old == new else group["lr"] * (new / old if old else 1.0)
        group.update({**options, "lr": present, "initial_lr": new})
    scheduler.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]
