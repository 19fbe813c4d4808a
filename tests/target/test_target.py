"""A target in a folder: known by content, and refused by name where it is not whole."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from peagle.target.target import TargetSource

UP = "model.layers.3.mlp.up_proj.weight"
MIDDLE = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path):
    """A copy of the embedded target."""
    copy = tmp_path / "target"
    ignored = shutil.ignore_patterns("*.py", "__pycache__", "*.jsonl")
    shutil.copytree(TargetSource("tiny").path, copy, ignore=ignored)
    return copy


def change(folder, tensors):
    path = folder / "model.safetensors"
    weights = {**load_file(path), **tensors}
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, path, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, f"lack: {UP}"),
        (torch.zeros(5, 192), rf"another shape: {UP}: \(5, 192\), and config.json says \(512, 192"),
    ],
    ids=["missing", "shape"],
)
def test_weights_that_transformers_would_make_up_are_refused_by_name(folder, tensor, words):
    change(folder, {UP: tensor})
    with pytest.raises(ValueError, match=words):
        TargetSource(str(folder)).model(dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS .* `git lfs pull`"),
        (b"", "model.safetensors is torn"),
    ],
    ids=["lfs", "empty"],
)
def test_a_file_that_is_not_the_weights_is_named_before_anything_is_loaded(folder, content, words):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=words):
        TargetSource(str(folder)).fingerprint()
    with pytest.raises(ValueError, match=words):
        TargetSource(str(folder)).model(dtype=torch.float32, device="cpu")


def test_a_quantised_target_without_its_package_is_refused_in_one_sentence(folder):
    settings = json.loads((folder / "config.json").read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"cannot be opened: .*optimum") as refused:
        TargetSource(str(folder)).model(dtype=torch.float32, device="cpu")
    assert "\n" not in str(refused.value)


def test_a_folder_is_known_by_every_tensor(folder, tmp_path):
    before = TargetSource(str(folder)).fingerprint()
    moved = shutil.move(folder, tmp_path / "moved")
    assert TargetSource(str(moved)).fingerprint() == before
    weight = load_file(moved / "model.safetensors")[MIDDLE]
    change(moved, {MIDDLE: weight + 1})
    assert TargetSource(str(moved)).fingerprint() != before


def test_a_folder_without_tokenizer_says_so(folder):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer files \(as tokenizer\.json\): copy"):
        TargetSource(str(folder)).tokenizer()
