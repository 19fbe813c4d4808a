"""What a run's configuration says about training, as far as costs depend on it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peagle.cod.sampling import Cod
from peagle.kernels.device import pick_device
from peagle.model.config import PEagleConfig
from peagle.store.manifest import Manifest


@dataclass(frozen=True)
class RunShape:
    """Those settings, by what they mean."""

    drafter_config: Callable[[Manifest], PEagleConfig]
    cod: Cod
    max_tokens: int
    max_rows: int | None
    memory_gb: float | None
    recompute: bool
    devices: int
    accumulate: int
    epochs: int  # -1: until max_steps
    max_steps: int  # -1: as many as the epochs have
    half: bool
    muon: bool
    train_embeddings: bool
    device: str  # where this machine's speed is measured


def run_shape(config: Any, optimizer: str) -> RunShape:
    """What the trainer's, the model's and the data's settings mean for costs."""
    model, data, trainer = config.model, config.data, config.trainer
    device = "cpu" if trainer.accelerator == "cpu" else pick_device("auto")
    return RunShape(
        drafter_config=model.drafter_config,
        cod=model.cod,
        max_tokens=data.max_tokens,
        max_rows=data.max_rows,
        memory_gb=data.memory_gb,
        recompute=model.recompute,
        devices=trainer.devices if isinstance(trainer.devices, int) else 1,
        accumulate=trainer.accumulate_grad_batches,
        epochs=trainer.max_epochs or 1000,  # Lightning's own default
        max_steps=trainer.max_steps,
        half="16" in str(trainer.precision),
        muon="Muon" in optimizer,
        train_embeddings=model.train_embeddings,
        device=device,
    )
