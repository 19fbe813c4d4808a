"""Starting from a published drafter: what is taken, named and refused."""

import pytest
import torch
from published_heads import aws_head, write_head
from random_parts import make_drafter

from peagle.model.published import find_published
from peagle.model.warm_start import refuse_unfit, start_from

EAGLE3 = {"parallel_drafting": False, "mask_token_id": None}


def started(drafter, folder, kept=None):
    kept = torch.arange(drafter.config.vocab_size) if kept is None else kept
    return start_from(drafter, find_published(str(folder)), kept)


@pytest.mark.parametrize("changes", [{}, EAGLE3, {"fc_norm": True, "norm_before_fc": True}])
def test_every_weight_is_taken(tmp_path, changes):
    published, ours = make_drafter(**changes), make_drafter(**changes)
    assert started(ours, write_head(tmp_path / "head", published)) == []
    for name, tensor in published.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.bfloat16().double()), name


def test_awss_heads_are_taken_whole(tmp_path):
    published, ours = make_drafter(), make_drafter()
    assert started(ours, aws_head(tmp_path / "head", published)) == []
    for name, tensor in published.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor.bfloat16().double()), name


@pytest.mark.parametrize(
    ("there", "here", "words"),
    [
        ({"hidden_size": 64, "head_dim": 8, "target_hidden_size": 32}, {},
         "hidden_size 64 there, 32 here: give --model.hidden_size 64, or another"),
        ({"vocab_size": 64}, {}, "vocab_size 64 there, 48 here: a run has these from its target"),
        ({"target_hidden_size": 16}, {}, "target_hidden_size 16 there, 32 here: a run has"),
        ({"eagle_aux_hidden_state_layer_ids": (1, 3)}, {}, 
         r"captured layers 2 there, 3 here: give --capture.layer_ids '\[1, 3\]', or another"),
        ({"mask_token_id": 6}, {}, "mask_token_id 6 there, 5 here: give --model.mask_token_id 6"),
        ({"num_hidden_layers": 3}, {}, "num_hidden_layers 3 there, 2 here: .*num_layers 3"),
        ({}, EAGLE3, "kind of drafter p-eagle there, eagle3 here; .* --model.drafter p-eagle"),
        (EAGLE3, {}, "kind of drafter eagle3 there, p-eagle here: give --model.drafter eagle3,"),
        ({"fc_norm": True}, {}, "fc_norm True there, False here: give --model.fc_norm true"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}, {}, "heads 2 there"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)  # fmt: skip
def test_another_shape_is_refused_before_any_weight_is_read(tmp_path, there, here, words):
    folder = write_head(tmp_path / "head", make_drafter(**there))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=f"this run cannot start from {folder}: .*{words}"):
        refuse_unfit(find_published(str(folder)), make_drafter(**here))


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({"norm.weight": None}, "norm.weight is missing there"),
        ({"mask_hidden": torch.zeros(3)}, r"mask_hidden \(3,\) there, \(1, 1, 96\) here"),
        (
            {"layers.0.self_attn.q_norm.weight": torch.zeros(8)},
            "q_norm.weight is of another",
        ),
        ({"fc.weight": torch.zeros(32, 96, dtype=torch.int8)}, r"is quantised there \(I8\)"),
    ],
    ids=["missing", "shape", "design", "quantised"],
)
def test_other_tensors_are_refused_by_their_headers(tmp_path, tensors, words):
    folder = write_head(tmp_path / "head", make_drafter(), tensors=tensors)
    with pytest.raises(ValueError, match=words):
        refuse_unfit(find_published(str(folder)), make_drafter().to("meta"))


def test_a_weight_that_is_not_finite_is_refused(tmp_path):
    broken = {"norm.weight": torch.full((32,), torch.nan)}
    folder = write_head(tmp_path / "head", make_drafter(), tensors=broken)
    with pytest.raises(ValueError, match=r"tensor norm.weight is not finite"):
        started(make_drafter(), folder)


def test_rows_of_tokens_in_both_draft_vocabularies_are_taken(tmp_path):
    published, ours = make_drafter(draft_vocab_size=20), make_drafter(draft_vocab_size=12)
    before = ours.lm_head.weight.detach().clone()
    theirs = published.target_ids(torch.arange(20)).tolist()
    kept = ours.target_ids(torch.arange(12))
    shared = [row for row, token in enumerate(kept.tolist()) if token in theirs]
    assert 0 < len(shared) < 12
    notes = started(ours, write_head(tmp_path / "head", published), kept)
    assert notes == [
        f"draft vocabulary: {len(shared)} of 12 tokens are in both, the head's rows of the other "
        f"{12 - len(shared)} start as usual"
    ]
    for row, token in enumerate(kept.tolist()):
        if row in shared:
            expected = published.lm_head.weight[theirs.index(token)].bfloat16().double()
        else:
            expected = before[row]
        assert torch.equal(ours.lm_head.weight[row], expected), row
    assert torch.equal(ours.target_ids(torch.arange(12)), kept)


def test_what_training_bridges_is_named_a_line_each(tmp_path):
    changes = {"num_depths": 4, "eagle_aux_hidden_state_layer_ids": (0, 2, 3), "rms_norm_eps": 1e-5}
    left_out = {"embed_tokens.weight": None, "lm_head.weight": None}
    folder = write_head(tmp_path / "head", make_drafter(**changes), tensors=left_out)
    assert started(make_drafter(), folder) == [
        "captured layers: [0, 2, 3] there, [1, 2, 3] in this run",
        "rms_norm_eps: 1e-05 there, 1e-06 in this run",
        "num_depths: 4 there, 8 in this run",
        "embed_tokens.weight is not published and starts as the target's",
        "lm_head.weight is not published and starts as the target's",
    ]
