import lightning as L
import pytest

from peagle.train.strategies import refuse_strategy


def trainer(strategy):
    return L.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_a_strategy_that_starts_from_this_process_is_refused(strategy):
    with pytest.raises(ValueError, match=r"cannot train a drafter: give --trainer\.strategy ddp"):
        refuse_strategy(trainer(strategy))


@pytest.mark.parametrize("strategy", ["ddp", "ddp_find_unused_parameters_true"])
def test_ddp_is_allowed(strategy):
    refuse_strategy(trainer(strategy))


def test_one_device_is_allowed():
    refuse_strategy(L.Trainer(accelerator="cpu", devices=1, logger=False))
