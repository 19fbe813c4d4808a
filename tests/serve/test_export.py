import json

import pytest
import torch
from random_parts import make_drafter
from safetensors.torch import load_file

from peagle.model.config import PEagleConfig, default_layer_ids
from peagle.model.eagle3 import Eagle3Drafter
from peagle.model.p_eagle import PEagleDrafter
from peagle.serve.contract import as_served, check_tensors, servable_tensors
from peagle.serve.export import Verifier, export_drafter, remove_export

VARIANTS = [
    {},
    {"num_hidden_layers": 4, "fc_norm": True},
    {"norm_before_fc": True, "norm_before_residual": True},
    {"draft_vocab_size": 20, "attention_bias": False},
]


def test_a_drafter_as_served_has_rounded_weights_and_exact_frequencies():
    drafter = make_drafter().float()
    exact = drafter.rotary.table.inv_freq.clone()
    rounded = drafter.fc.weight.detach().bfloat16().float()
    served = as_served(drafter, torch.float32)
    assert torch.equal(served.fc.weight, rounded)
    assert torch.equal(served.rotary.table.inv_freq, exact)
    assert not torch.equal(exact, exact.bfloat16().float())


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda c: "+".join(c) or "plain")
def test_an_exported_drafter_loads_bit_equal(tmp_path, changes):
    drafter = make_drafter(**changes).to(torch.bfloat16)
    export_drafter(drafter, tmp_path / "drafter")
    loaded = PEagleDrafter.from_pretrained(tmp_path / "drafter", dtype=torch.bfloat16)
    assert loaded.state_dict().keys() == drafter.state_dict().keys()
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_configuration_says_all_that_vllm_reads(tmp_path):
    export_drafter(make_drafter(), tmp_path / "drafter")
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert config["mask_token_id"] == config["pard_token"] == config["ptd_token_id"] == 5
    assert config["num_aux_hidden_states"] == len(config["eagle_aux_hidden_state_layer_ids"]) == 3
    assert config["parallel_drafting"] is True
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert config["torch_dtype"] == "bfloat16"
    for key in ("vocab_size", "draft_vocab_size", "target_hidden_size", "head_dim"):
        assert isinstance(config[key], int)


def test_the_speculators_layout_keeps_every_flag_inside_the_layer_configuration(tmp_path):
    verifier = Verifier("org/target", ["LlamaForCausalLM"])
    export_drafter(
        make_drafter(fc_norm=True), tmp_path / "d", layout="speculators", verifier=verifier
    )
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["speculators_config"]["verifier"]["name_or_path"] == "org/target"
    assert config["mask_token_id"] == 5
    assert config["transformer_layer_config"]["fc_norm"] is True
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == 3


def test_an_eagle3_drafter_has_nothing_of_a_mask_token_and_loads_bit_equal(tmp_path):
    drafter = make_drafter(parallel_drafting=False, num_hidden_layers=1).to(torch.bfloat16)
    export_drafter(drafter, tmp_path / "drafter")
    ours, parallel = (
        {name for name in made.state_dict()}
        for made in (drafter, make_drafter(num_hidden_layers=1))
    )
    assert parallel - ours == {"mask_hidden"} and ours < parallel
    config = json.loads((tmp_path / "drafter" / "config.json").read_text())
    assert config["parallel_drafting"] is False
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert not {"mask_token_id", "pard_token", "ptd_token_id"} & config.keys()
    loaded = Eagle3Drafter.from_pretrained(tmp_path / "drafter", dtype=torch.bfloat16)
    for name, tensor in drafter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_the_speculators_layout_of_an_eagle3_drafter_asks_for_no_parallel_drafting(tmp_path):
    drafter = make_drafter(parallel_drafting=False, fc_norm=True)
    verifier = Verifier("org/target", ["LlamaForCausalLM"])
    export_drafter(drafter, tmp_path / "d", layout="speculators", verifier=verifier, k=3)
    config = json.loads((tmp_path / "d" / "config.json").read_text())
    assert config["speculators_model_type"] == "eagle3"
    assert config["speculators_config"]["algorithm"] == "eagle3"
    assert config["fc_norm"] is True and "mask_token_id" not in config


def test_the_speculators_layout_without_a_target_is_refused(tmp_path):
    with pytest.raises(ValueError, match="target"):
        export_drafter(make_drafter(), tmp_path / "d", layout="speculators")


def test_only_a_pruned_vocabulary_ships_its_maps(tmp_path):
    export_drafter(make_drafter(), tmp_path / "full")
    export_drafter(make_drafter(draft_vocab_size=20), tmp_path / "pruned")
    full = load_file(tmp_path / "full" / "model.safetensors")
    pruned = load_file(tmp_path / "pruned" / "model.safetensors")
    assert not {"d2t", "t2d"} & full.keys()
    assert pruned["d2t"].dtype == torch.int64 and pruned["t2d"].dtype == torch.bool


def test_a_missing_tensor_is_named():
    drafter = make_drafter()
    tensors = servable_tensors(drafter)
    del tensors["layers.1.post_attention_layernorm.weight"]
    with pytest.raises(ValueError, match=r"layers\.1\.post_attention_layernorm\.weight is missing"):
        check_tensors(tensors, drafter.config)


def test_a_tensor_too_many_is_named():
    drafter = make_drafter()
    tensors = servable_tensors(drafter) | {"verifier_lm_head": torch.zeros(1)}
    with pytest.raises(ValueError, match="verifier_lm_head is not part"):
        check_tensors(tensors, drafter.config)


def test_weights_that_are_not_finite_are_refused_and_the_old_folder_stays(tmp_path):
    drafter = make_drafter()
    export_drafter(drafter, tmp_path / "d")
    before = (tmp_path / "d" / "model.safetensors").read_bytes()
    with torch.no_grad():
        drafter.norm.weight[0] = torch.inf
    with pytest.raises(ValueError, match=r"norm\.weight is not finite"):
        export_drafter(drafter, tmp_path / "d")
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("layers", "ids"),
    [(36, (2, 18, 33)), (24, (2, 12, 21)), (8, (2, 4, 5)), (6, (2, 3)), (2, (1, 2)), (1, (1,))],
)
def test_default_layer_ids_are_vllms_and_stay_inside_small_targets(layers, ids):
    assert default_layer_ids(layers) == ids


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"eagle_aux_hidden_state_layer_ids": (3, 2)}, "ascending"),
        ({"eagle_aux_hidden_state_layer_ids": (2, 2)}, "unique"),
        ({"mask_token_id": 48}, r"0\.\.47"),
        ({"draft_vocab_size": 49}, "exceeds"),
        ({"hidden_state": "own"}, "shared, depth, anchor, anchor_depth, anchor_scaled, got 'own'"),
    ],
)
def test_a_configuration_that_cannot_be_served_is_refused(changes, words):
    with pytest.raises(Exception, match=words):
        make_drafter(**changes)


@pytest.mark.parametrize("design", ["depth", "anchor", "anchor_depth", "anchor_scaled"])
def test_a_hidden_state_that_no_engine_serves_is_refused_in_one_sentence(tmp_path, design):
    with pytest.raises(ValueError, match=f"hidden_state '{design}' cannot be exported: vLLM"):
        export_drafter(make_drafter(hidden_state=design), tmp_path / "d")
    assert not (tmp_path / "d").exists()


def test_what_is_served_does_not_name_its_hidden_state(tmp_path):
    export_drafter(make_drafter(), tmp_path / "d")
    assert "hidden_state" not in json.loads((tmp_path / "d" / "config.json").read_text())


def test_rotary_tables_survive_a_reload(tmp_path):
    drafter = make_drafter().float()
    drafter.save_pretrained(tmp_path)
    loaded = PEagleDrafter.from_pretrained(tmp_path)
    position = torch.arange(50)
    for ours, theirs in zip(
        drafter.rotary.angles(position, torch.float32),
        loaded.rotary.angles(position, torch.float32),
        strict=True,
    ):
        assert torch.equal(ours, theirs)
    assert isinstance(loaded.config, PEagleConfig)


def tree(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_only_an_earlier_export_is_replaced(tmp_path):
    folder = tmp_path / "drafter"
    for name in ("drafter.tmp", "drafter.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "backup").write_text("keep")
    for layers in (1, 2):
        export_drafter(make_drafter(num_hidden_layers=layers), folder)
    assert json.loads((folder / "config.json").read_text())["num_hidden_layers"] == 2
    assert {path.name for path in tmp_path.iterdir()} == {"drafter", "drafter.tmp", "drafter.old"}
    assert (tmp_path / "drafter.old" / "backup").read_text() == "keep"
    (folder / "notes.txt").write_text("keep")
    before = tree(tmp_path)
    for act in (lambda: export_drafter(make_drafter(), folder), lambda: remove_export(folder)):
        with pytest.raises(ValueError, match=r"holds notes\.txt, which no export wrote"):
            act()
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("files", "out", "message"),
    [
        (["run/checkpoints/last.ckpt"], "run", "holds checkpoints, which no export wrote"),
        (["last.ckpt"], "last.ckpt", "last.ckpt is a file"),
        (["last.ckpt"], "last.ckpt/drafter", "last.ckpt is a file"),
        (["model/config.json", "model/model.safetensors"], "model", "is no earlier export"),
    ],
)
def test_what_is_no_export_is_refused_and_stays(tmp_path, files, out, message):
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text('{"model_type": "llama"}')
    before = tree(tmp_path)
    with pytest.raises(ValueError, match=message):
        export_drafter(make_drafter(), tmp_path / out)
    assert tree(tmp_path) == before


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for layers in (1, 2):
        export_drafter(make_drafter(num_hidden_layers=layers), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").is_dir()
    assert {path.name for path in tmp_path.iterdir()} == {"link", "real"}


def test_a_k_that_no_file_would_hold_is_refused(tmp_path):
    with pytest.raises(ValueError, match="only the speculators layout holds k"):
        export_drafter(make_drafter(), tmp_path / "drafter", k=3)
    verifier = Verifier("org/target", ["LlamaForCausalLM"])
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        export_drafter(
            make_drafter(), tmp_path / "drafter", layout="speculators", verifier=verifier, k=0
        )
