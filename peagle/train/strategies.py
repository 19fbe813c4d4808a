"""Which of Lightning's strategies can train a drafter."""

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, SingleDeviceStrategy


def refuse_strategy(trainer: L.Trainer) -> None:
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
