"""Reading drafters that were published elsewhere."""

import json

import pytest
import torch
from published_heads import aws_head, write_head
from random_parts import LAYER_IDS, VOCABULARY, make_drafter
from safetensors.torch import load_file, save_file

from peagle.model.published import find_published
from peagle.serve.export import Verifier, export_drafter

SPECULATORS = {"layout": "speculators", "verifier": Verifier("o/t", ["LlamaForCausalLM"])}


@pytest.mark.parametrize("layout", [{}, SPECULATORS], ids=["eagle3", "speculators"])
@pytest.mark.parametrize("changes", [{}, {"parallel_drafting": False, "draft_vocab_size": 20}])
def test_what_export_writes_is_read_back(tmp_path, layout, changes):
    drafter = make_drafter(**changes)
    export_drafter(drafter, tmp_path / "drafter", **layout)
    found = find_published(str(tmp_path / "drafter"))
    for name in ("method", "mask_token_id", "num_aux", "draft_vocab_size", "rope_parameters"):
        assert getattr(found.config, name) == getattr(drafter.config, name), name
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(found.read(name), tensor.to(found.read(name).dtype)), name
    assert (
        found.token_ids().tolist()
        == drafter.target_ids(torch.arange(found.config.draft_vocab_size)).tolist()
    )


def test_the_names_of_awss_heads_are_read(tmp_path):
    drafter = make_drafter()
    found = find_published(str(aws_head(tmp_path / "head", drafter)))
    assert found.config.method == "p-eagle"
    assert found.config.mask_token_id == drafter.config.mask_token_id
    assert found.config.num_aux == len(LAYER_IDS)
    assert found.config.eagle_aux_hidden_state_layer_ids != list(LAYER_IDS)
    assert "eagle_aux_hidden_state_layer_ids" not in found.given
    assert {"layers.0.hidden_norm.weight", "layers.1.mlp.up_proj.weight"} <= found.places.keys()
    assert found.token_ids().tolist() == list(range(VOCABULARY))


def test_weights_in_several_files_are_found(tmp_path):
    folder = write_head(tmp_path / "head", make_drafter())
    tensors = load_file(folder / "model.safetensors")
    embedding = {"embed_tokens.weight": tensors.pop("embed_tokens.weight")}
    save_file(tensors, folder / "model.safetensors")
    save_file(embedding, folder / "embedding.safetensors")
    found = find_published(str(folder))
    assert found.places.keys() == tensors.keys() | embedding.keys()
    assert torch.equal(found.read("embed_tokens.weight"), embedding["embed_tokens.weight"])


def test_a_head_comes_from_the_hub_at_a_commit_its_config_first(tmp_path, own_hub):
    folder = aws_head(tmp_path / "head", make_drafter())
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = own_hub.put("alice/head", files)
    found = find_published("alice/head")
    assert found.name == f"hf://alice/head@{commit}"
    assert not any("safetensors" in address for _, address in own_hub.requests)
    own_hub.put("alice/head", {})  # the branch moves on
    assert "fc.weight" in found.places
    assert find_published(f"hf://alice/head@{commit}").config.to_dict() == found.config.to_dict()
    put = own_hub.put("alice/head", {f"drafter/{name}": content for name, content in files.items()})
    inside = find_published("hf://alice/head/drafter@main")
    assert inside.name == f"hf://alice/head/drafter@{put}"
    assert inside.places.keys() == found.places.keys()


@pytest.mark.parametrize("address", ["no/head", "no/such/folder", "/no/such", "nothing"])
def test_what_is_neither_folder_nor_on_the_hub_is_refused(own_hub, address):
    with pytest.raises(ValueError, match=f"there is no folder {address}"):
        find_published(address)


def test_what_is_no_drafter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"has no config.json: give .* as RUN/drafter"):
        find_published(str(tmp_path))
    (tmp_path / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"is a file: give the folder of a drafter .*export"):
        find_published(str(tmp_path / "last.ckpt"))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="is not the configuration of a drafter"):
        find_published(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(make_drafter().config.to_dict()))
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match="holds no safetensors file, and no other kind is read"):
        _ = find_published(str(tmp_path)).places


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden_size": None}, "it has no hidden_size"),
        ({"hidden_size": "32"}, "expected int, got str"),
        ({"mask_token_id": "<mask>"}, "invalid literal"),
        ({"num_attention_heads": 0}, "the number of heads must be at least 1"),
        ({"eagle_aux_hidden_state_layer_ids": None, "num_aux_hidden_states": 10**12}, "in 1..999"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_configuration_that_is_no_drafters_is_refused(tmp_path, settings, words):
    folder = write_head(tmp_path / "head", make_drafter(), settings=settings)
    with pytest.raises(ValueError, match=f"config.json is not the configuration .*{words}"):
        find_published(str(folder))


@pytest.mark.parametrize(
    ("d2t", "words"),
    [
        (None, "has no d2t"),
        ([0] * 19 + [99], "20 offsets to different tokens below 48"),
        ([1] + [0] * 19, "offsets"),
    ],
)
def test_a_draft_vocabulary_that_names_no_tokens_is_refused(tmp_path, d2t, words):
    drafter = make_drafter(draft_vocab_size=20)
    tensors = {"d2t": None if d2t is None else torch.tensor(d2t)}
    found = find_published(str(write_head(tmp_path / "head", drafter, tensors=tensors)))
    with pytest.raises(ValueError, match=words):
        found.token_ids()
