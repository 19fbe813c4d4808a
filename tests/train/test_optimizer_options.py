import copy

import pytest
import torch
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    MultiStepLR,
)

from peagle.train.optimizer_options import (
    impose,
    impose_schedule,
    options_of,
    schedule_options_of,
)
from peagle.train.schedule import LinearSchedule


def trained(lr, steps, state=None, **options):
    """Optimizer and schedule after some steps, restored from a state first if one is given."""
    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.AdamW([parameter], lr=lr, **options)
    configured = options_of(optimizer)
    schedule = LinearSchedule(optimizer, total_steps=20, warmup_ratio=0.25)
    if state is not None:
        optimizer.load_state_dict(copy.deepcopy(state[0]))
        schedule.load_state_dict(copy.deepcopy(state[1]))
        impose(configured, optimizer, schedule)
    for _ in range(steps):
        parameter.grad = torch.ones(2)
        optimizer.step()
        schedule.step()
    return optimizer, schedule


def group(optimizer):
    return {key: value for key, value in optimizer.param_groups[0].items() if key != "params"}


@pytest.mark.parametrize("done", [1, 4, 12])
def test_unchanged_options_change_nothing(done):
    optimizer, schedule = trained(3e-4, done)
    saved = optimizer.state_dict(), schedule.state_dict()
    resumed, _ = trained(3e-4, 0, saved)
    assert group(resumed) == group(optimizer)
    assert group(trained(3e-4, 5, saved)[0]) == group(trained(3e-4, done + 5)[0])


@pytest.mark.parametrize("done", [1, 4, 12])
def test_a_changed_learning_rate_follows_the_same_schedule(done):
    optimizer, schedule = trained(4e-4, done)
    saved = optimizer.state_dict(), schedule.state_dict()
    resumed, follower = trained(1e-4, 5, saved, weight_decay=0.3, betas=(0.5, 0.6))
    wanted = trained(1e-4, done + 5)[0].param_groups[0]["lr"]
    assert resumed.param_groups[0]["lr"] == pytest.approx(wanted, rel=1e-12)
    assert follower.get_last_lr() == [resumed.param_groups[0]["lr"]]
    assert (resumed.param_groups[0]["weight_decay"], resumed.param_groups[0]["betas"]) == (
        0.3,
        (0.5, 0.6),
    )


def restored(make, saved):
    """A schedule with its configured options over a saved place."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = make(optimizer)
    configured = schedule_options_of(schedule)
    schedule.load_state_dict(copy.deepcopy(saved))
    impose_schedule(configured, schedule)
    return schedule


def after(make, steps):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    schedule = make(optimizer)
    for _ in range(steps):
        optimizer.step()
        schedule.step()
    return schedule


SCHEDULES = {
    "cosine": lambda optimizer: CosineAnnealingLR(optimizer, T_max=20, eta_min=0.1),
    "restarts": lambda optimizer: CosineAnnealingWarmRestarts(optimizer, T_0=3, T_mult=2),
    "milestones": lambda optimizer: MultiStepLR(optimizer, milestones=[3, 7], gamma=0.5),
    "linear": lambda optimizer: LinearSchedule(optimizer, total_steps=20, warmup_ratio=0.25),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("steps", [1, 5, 9])
def test_a_restored_schedule_stands_where_it_stood(name, steps):
    whole = after(SCHEDULES[name], steps)
    assert restored(SCHEDULES[name], whole.state_dict()).state_dict() == whole.state_dict()


def test_a_schedule_that_was_made_longer_is_longer_after_a_resume():
    """PyTorch's schedulers save their arguments with their place and would bring them back."""
    short = after(lambda optimizer: CosineAnnealingLR(optimizer, T_max=10), 4).state_dict()
    assert short["T_max"] == 10
    longer = restored(lambda optimizer: CosineAnnealingLR(optimizer, T_max=30), short)
    assert (longer.T_max, longer.last_epoch) == (30, 4)
