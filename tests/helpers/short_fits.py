"""Short fits on a store of random hidden states."""

import lightning as L
from torch.optim import AdamW

from peagle.callbacks.checkpoint import AtomicCheckpointIO, Checkpoint
from peagle.cod.sampling import Cod
from peagle.decode.evaluation import EvaluationConfig
from peagle.train.datamodule import HiddenStatesDataModule
from peagle.train.module import PEagleModule

COD = Cod(4, 0.8)


def make_module(**changes):
    settings = {"mask_token_id": 1, "cod": COD, "num_layers": 2}
    return PEagleModule(**{**settings, "optimizer": lambda p: AdamW(p, lr=3e-3), **changes})


def make_data(store, **changes):
    settings = {"max_tokens": 64, "max_rows": 200, "num_workers": 0, "seed": 0}
    return HiddenStatesDataModule(
        target="tiny",
        revision=None,
        store=str(store),
        cod=COD,
        mask_token_id=1,
        evaluation=EvaluationConfig(),
        **{**settings, **changes},
    )


def make_trainer(folder, steps, **changes):
    settings = {
        "default_root_dir": str(folder),
        "max_steps": steps,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "plugins": [AtomicCheckpointIO()],
        "callbacks": [Checkpoint(every_n_steps=10)],
    }
    return L.Trainer(**{**settings, **changes})


class Losses(L.Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(float(outputs["loss"]))


BASELINE = {"drafter": "eagle3", "mask_token_id": None, "depth_decay": 0.8}
