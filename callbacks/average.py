"""An exponential moving average of the weights: what is validated, saved, exported and tested."""

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel


class AveragedWeights(EMAWeightAveraging):
    """Lightning's own callback, made to agree with checkpoints that can be cut at any step.

    A checkpoint holds the average as the drafter's weights, and the weights in training beside it,
    so a run resumes where it stood. From the end of fit on, the module holds the average.

    Args:
        decay: share of the average that stays at each step. It looks back about ``1 / (1 - decay)``
            steps, which should be few against the length of the run.
        start_step: optimizer steps before the first one is averaged.
    """

    def __init__(self, decay: float = 0.99, start_step: int = 0):
        if not 0 <= decay < 1:
            raise ValueError(f"decay must lie in [0, 1), got {decay}")
        # Buffers are the target's head and integer maps of the vocabulary: never averaged.
        super().__init__(use_buffers=False, decay=decay, update_starting_at_step=start_step)
        self.swapped = False
        self.trained: nn.Module | None = None

    @property
    def average(self) -> nn.Module:
        """What is averaged, under the names of the module."""
        return self._average_model.module

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Average the drafter alone: Lightning's copy of the whole module would hold the target's
        head twice, and cannot be made of what the command line puts into it."""
        if stage != "fit":
            return
        pl_module.configure_model()
        trained = nn.ModuleDict({"drafter": pl_module.drafter})
        names = [[name for name, _ in m.named_parameters()] for m in (trained, pl_module)]
        assert names[0] == names[1], "Lightning pairs the parameters by their order"
        self.trained = trained
        self._average_model = AveragedModel(
            trained, trainer.strategy.root_device, use_buffers=False, **self._kwargs
        )

    def on_train_batch_end(self, trainer: L.Trainer, _: L.LightningModule, *rest: Any) -> None:
        super().on_train_batch_end(trainer, self.trained, *rest)
        if not self._average_model.n_averaged:  # not begun: nobody may save the weights of step 0
            pairs = zip(self.average.parameters(), self.trained.parameters(), strict=True)
            for average, own in pairs:
                average.data.copy_(own.data)

    def on_train_end(self, *_: Any) -> None:
        """Not yet: the last checkpoint is to hold the average and the weights in training too."""

    def on_fit_end(self, *_: Any) -> None:
        """Also when a finished run is fitted again, which trains nothing."""
        self._copy_average_to_current(self.trained)

    def on_validation_epoch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.state.fn == "fit":  # afterwards the module itself holds the average
            super().on_validation_epoch_start(trainer, self.trained)
            self.swapped = True

    def on_validation_epoch_end(self, *_: Any) -> None:
        self.swap_back()

    def on_exception(self, trainer: L.Trainer, *_: Any) -> None:
        """Before ``Checkpoint``, which Lightning calls last, saves what is finished."""
        self.swap_back()

    def swap_back(self) -> None:
        if self.swapped:
            self._swap_models(self.trained)
            self.swapped = False

    def on_load_checkpoint(self, *args: Any) -> None:
        if self._average_model is not None:  # validate and test need the average only
            super().on_load_checkpoint(*args)
