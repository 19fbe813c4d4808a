"""The drafter of a checkpoint that ``fit`` wrote."""

from pathlib import Path

from peagle.model.build import build_drafter
from peagle.model.checkpoint import read_checkpoint
from peagle.model.drafter import Drafter
from peagle.model.restore import refuse_incomplete, refuse_other_tensors, saved_config


def load_drafter(ckpt_path: Path | str) -> Drafter:
    """The drafter of a checkpoint, for export and decoding; runs no code from the file."""
    checkpoint = read_checkpoint(str(ckpt_path))
    refuse_incomplete(checkpoint)
    config = saved_config(checkpoint)
    drafter = build_drafter(config)
    weights = {
        name.removeprefix("drafter."): tensor
        for name, tensor in checkpoint["state_dict"].items()
        if name.startswith("drafter.")
    }
    refuse_other_tensors(weights, drafter.state_dict())
    drafter.load_state_dict(weights)
    return drafter.eval()
