"""What vLLM would load in silence, or not at all, is refused by the check of a folder."""

import json

import pytest
import torch
from random_parts import make_drafter
from safetensors.torch import load_file, save_file

from peagle.serve.contract import check_folder
from peagle.serve.export import Verifier, export_drafter

VERIFIER = Verifier("org/target", ["LlamaForCausalLM"])


@pytest.fixture(params=["eagle3", "speculators"])
def folder(request, tmp_path):
    drafter = make_drafter(fc_norm=True, draft_vocab_size=20).to(torch.bfloat16)
    export_drafter(drafter, tmp_path / "d", layout=request.param, verifier=VERIFIER)
    return tmp_path / "d"


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config, config.get("transformer_layer_config", config))
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_as_exported_passes_and_states_its_settings(folder):
    config = check_folder(folder)
    assert (config.num_hidden_layers, config.draft_vocab_size, config.mask_token_id) == (2, 20, 5)
    assert config.fc_norm is True


def test_a_missing_tensor_is_named_whichever_it_is(folder):
    whole = load_file(folder / "model.safetensors")
    assert len(whole) == 29
    for name in whole:
        change_tensors(folder, lambda tensors, name=name: tensors.pop(name))
        with pytest.raises(ValueError, match=f"tensor {name} is missing"):
            check_folder(folder)
        save_file(whole, folder / "model.safetensors")


def test_a_tensor_that_vllm_does_not_know_is_named(folder):
    change_tensors(folder, lambda tensors: tensors.update({"model.extra": torch.zeros(2)}))
    with pytest.raises(ValueError, match=r"model\.extra is not part of a servable drafter"):
        check_folder(folder)


def test_an_identity_map_instead_of_offsets_is_refused(folder):
    change_tensors(folder, lambda tensors: tensors.update(d2t=torch.arange(20)))
    with pytest.raises(ValueError, match="d2t must hold offsets"):
        check_folder(folder)


def test_a_truncated_weight_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors cannot be read"):
        check_folder(folder)


@pytest.mark.parametrize("name", ["num_aux_hidden_states", "pard_token", "parallel_drafting"])
def test_a_field_that_some_vllm_needs_may_not_be_missing(folder, name):
    change_config(folder, lambda config, plain: plain.pop(name))
    with pytest.raises(ValueError, match=f"{name} is None"):
        check_folder(folder)


def test_two_mask_tokens_are_refused(folder):
    change_config(folder, lambda config, plain: plain.update(pard_token=7))
    with pytest.raises(ValueError, match="pard_token is 7, must be 5"):
        check_folder(folder)


def test_a_configuration_that_is_not_json_is_refused(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not the configuration of a drafter"):
        check_folder(folder)


def test_engines_of_other_users_may_read_the_weights(folder):
    for path in folder.iterdir():
        assert path.stat().st_mode & 0o444 == 0o444, path


def test_a_long_context_variant_of_rotary_is_written_in_both_spellings(tmp_path):
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5,
            "original_max_position_embeddings": 128}  # fmt: skip
    export_drafter(make_drafter(rope_parameters=rope).to(torch.bfloat16), tmp_path / "d")
    written = json.loads((tmp_path / "d" / "config.json").read_text())
    assert written["rope_parameters"] == rope
    assert written["rope_theta"] == 5e5
    assert written["rope_scaling"] == {k: v for k, v in rope.items() if k != "rope_theta"}
    assert check_folder(tmp_path / "d").rope_parameters == rope


def test_the_speculators_folder_asks_for_the_trained_depth_or_for_the_given_k(tmp_path):
    for k, asked in ((None, 6), (4, 4)):
        drafter = make_drafter(num_depths=6).to(torch.bfloat16)
        export_drafter(drafter, tmp_path / "d", layout="speculators", verifier=VERIFIER, k=k)
        config = json.loads((tmp_path / "d" / "config.json").read_text())
        proposal = config["speculators_config"]["proposal_methods"][0]
        assert proposal["speculative_tokens"] == asked
