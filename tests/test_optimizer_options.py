import copy

import pytest
import torch

from peagle.module import LinearSchedule
from peagle.optimizer_options import impose, options_of


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
