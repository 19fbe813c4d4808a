import copy

import pytest
import torch

from peagle.train.skip_nonfinite import SkipNonfinite, nan_unless_finite


def test_a_finite_loss_passes_unchanged_with_its_gradient():
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    loss = (x * x).sum()
    assert torch.equal(nan_unless_finite(loss), loss)
    nan_unless_finite(loss).backward()
    assert torch.equal(x.grad, torch.tensor([4.0, 6.0]))


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_loss_that_is_not_finite_spoils_gradients_that_are(bad):
    x = torch.tensor([2.0, 3.0], requires_grad=True)
    nan_unless_finite((x * x).sum() + bad).backward()
    assert x.grad.isnan().all()


OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.1, weight_decay=0.5),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.1, weight_decay=0.5),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_one_bad_gradient_leaves_every_weight_and_moment_as_it_was(name, bad):
    parameters = [torch.nn.Parameter(torch.randn(3, 2)) for _ in range(3)]
    optimizer, guard = OPTIMIZERS[name](parameters), SkipNonfinite()
    for parameter in parameters:
        parameter.grad = torch.randn(3, 2)
    guard.norm(parameters)
    optimizer.step()
    weights = [p.detach().clone() for p in parameters]
    state = copy.deepcopy(optimizer.state_dict())
    for parameter in parameters:
        parameter.grad = torch.randn(3, 2)
    parameters[1].grad[2, 1] = bad
    guard.norm(parameters)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(weights, parameters, strict=True))
    after = optimizer.state_dict()["state"]
    assert len(after) == 3
    for number, values in state["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after[number][k]))
                   for k, v in values.items())  # fmt: skip
    assert (guard.skipped, guard.in_a_row) == (1, 1)


def test_the_norm_is_that_of_all_gradients_together():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert SkipNonfinite().norm(parameters) == 5.0


def test_only_steps_in_a_row_end_the_run():
    parameter = torch.nn.Parameter(torch.zeros(1))
    guard = SkipNonfinite(patience=3)

    def step(value):
        parameter.grad = torch.tensor([value])
        guard.norm([parameter])
        guard.stop_if_hopeless()

    for value in (torch.nan, torch.nan, 1.0, torch.inf, torch.nan):
        step(value)
    with pytest.raises(ValueError, match=r"3 steps in a row \(5 in all\)"):
        step(torch.nan)
