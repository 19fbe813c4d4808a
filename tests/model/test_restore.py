"""A checkpoint that is read as data can still be the wrong one, or ask for code."""

import json

import pytest
import torch
from random_parts import make_drafter, make_target

from peagle.model.restore import (
    PARTS,
    refuse_differences,
    refuse_incomplete,
    refuse_other_tensors,
    refuse_unknown_fields,
    saved_config,
)
from peagle.model.saved_drafter import load_drafter
from peagle.target.target import TargetSource


@pytest.fixture
def checkpoint():
    """What matters of a checkpoint of ``fit``."""
    drafter = make_drafter().float()
    weights = {f"drafter.{name}": tensor for name, tensor in drafter.state_dict().items()}
    return {part: {} for part in PARTS} | {
        "drafter_config": drafter.config.to_dict(),
        "state_dict": weights,
    }


def test_a_drafter_comes_back_with_its_weights(checkpoint, tmp_path):
    torch.save(checkpoint, tmp_path / "x.ckpt")
    drafter = load_drafter(tmp_path / "x.ckpt")
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(tensor, checkpoint["state_dict"][f"drafter.{name}"])


CODE = {
    "attn_implementation": "somebody/kernel",
    "_attn_implementation": "somebody/kernel",
    "experts_implementation": "x",
    "quantization_config": {"quant_method": "x"},
    "use_kernels": True,
    "auto_map": {"AutoModel": "somebody/code--module.Class"},
}


@pytest.mark.parametrize("key", CODE)
def test_a_setting_by_which_code_could_be_fetched_is_refused(checkpoint, tmp_path, key):
    checkpoint["drafter_config"][key] = CODE[key]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match=f"settings that no drafter has: {key}"):
        load_drafter(tmp_path / "x.ckpt")


def test_a_store_may_not_bring_such_a_setting_either():
    refuse_unknown_fields({"hidden_size": 8, "rope_parameters": {}}, "the manifest")
    with pytest.raises(ValueError, match="the manifest has settings that no drafter has: auto_map"):
        refuse_unknown_fields({"hidden_size": 8, "auto_map": {}}, "the manifest")


def test_settings_that_only_name_things_are_dropped(checkpoint):
    checkpoint["drafter_config"] |= {"_name_or_path": "somebody/else", "transformers_version": "9"}
    config = saved_config(checkpoint)
    assert config._name_or_path == "" and config.mask_token_id == 5


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_is_named(checkpoint, part):
    del checkpoint[part]
    with pytest.raises(ValueError, match=f"not written by peagle's fit: it has no {part}"):
        refuse_incomplete(checkpoint)


@pytest.mark.parametrize("content", [None, [1], "text", torch.zeros(3)])
def test_what_is_no_dictionary_is_no_checkpoint(content):
    with pytest.raises(ValueError, match="not written by peagle's fit"):
        refuse_incomplete(content)


def test_tensors_that_a_drafter_has_not_are_named(checkpoint, tmp_path):
    weights = checkpoint["state_dict"]
    weights["drafter.fc.weight"] = torch.zeros(2, 3)
    weights["drafter.more"] = torch.zeros(1)
    del weights["drafter.norm.weight"]
    torch.save(checkpoint, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="other tensors") as raised:
        load_drafter(tmp_path / "x.ckpt")
    for words in ("fc.weight: checkpoint (2, 3), ours (32, 96)", "more: checkpoint (1,), ours None",
                  "norm.weight: checkpoint None, ours (32,)"):  # fmt: skip
        assert words in str(raised.value)


def test_a_long_list_of_differences_is_cut():
    tensors = {str(number): torch.zeros(1) for number in range(10)}
    with pytest.raises(ValueError, match="and 7 more"):
        refuse_other_tensors({}, tensors)
    refuse_other_tensors(tensors, dict(tensors))


def test_differences_say_both_values():
    refuse_differences({}, {"a": 1}, "is another")
    refuse_differences({"a": 1, "dtype": "x"}, {"a": 1, "dtype": "y"}, "is another")
    with pytest.raises(
        ValueError, match="is another: a: checkpoint 1, this run 2; b: checkpoint 3"
    ):
        refuse_differences({"a": 1, "b": 3}, {"a": 2}, "is another")


@pytest.mark.parametrize("kind", ["llama", "one_that_transformers_does_not_know"])
def test_code_that_a_target_brings_is_never_run(kind, tmp_path):
    target, ran = tmp_path / "target", tmp_path / "ran"
    make_target().save_pretrained(target)
    config = json.loads((target / "config.json").read_text())
    own = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    (target / "config.json").write_text(json.dumps({**config, "model_type": kind, "auto_map": own}))
    (target / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\nclass Config: pass\n")
    source = TargetSource(str(target), None)
    if kind == "llama":  # it can do without
        assert source.model(dtype=torch.float32, device="cpu").config.model_type == kind
    else:
        with pytest.raises(ValueError, match="cannot be opened"):
            source.model(dtype=torch.float32, device="cpu")
    assert not ran.exists()


def test_a_target_with_pickled_weights_is_refused(tmp_path):
    make_target().config.save_pretrained(tmp_path)
    torch.save(make_target().state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"cannot be opened.*safetensors"):
        TargetSource(str(tmp_path), None).model(dtype=torch.float32, device="cpu")
