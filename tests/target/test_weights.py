"""Weights taken out of a target are written whole or not at all."""

import pytest
import torch

from peagle.target import weights
from peagle.target.weights import read_weights, write_weights


def test_a_kill_while_weights_are_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "target.safetensors"
    write_weights(path, {"head": torch.ones(2, 3)})

    def killed(tensors, place, metadata):
        place.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weights, "save_file", killed)
        write_weights(path, {"head": torch.zeros(2, 3)})
    assert torch.equal(read_weights(path)["head"], torch.ones(2, 3))
    write_weights(path, {"head": torch.zeros(2, 3)})  # what the kill left is written over
    assert [place.name for place in tmp_path.iterdir()] == [path.name]
