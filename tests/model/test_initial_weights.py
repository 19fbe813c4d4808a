"""An untrained drafter already does what the target's own layers, copied, can do."""

import pytest
import torch
from random_parts import VOCABULARY, WIDTH, make_drafter, make_target

from peagle.model import initial_weights as initial
from peagle.model.initial_weights import SHARPNESS, initialise, open_entrance
from peagle.target.head import target_head_of
from peagle.target.layers import TargetLayers, default_start_layers, target_layers_of

ALL = torch.arange(VOCABULARY)


def even_target():
    """Embeddings of equal length in every head: a norm loses nothing, none outshines the slot."""
    target = make_target(num_layers=3)
    heads = target.get_input_embeddings().weight.data.unflatten(1, (4, -1))
    heads /= heads.pow(2).mean(-1, keepdim=True).sqrt()
    return target


def start(target, indices, **changes):
    drafter = make_drafter(**changes)
    head = target_head_of(target, target.config)
    return drafter, initialise(drafter, head, ALL, target_layers_of(target, target.config, indices))


def test_with_all_layers_of_the_target_depth_zero_is_the_target(monkeypatch):
    monkeypatch.setattr(initial, "SHARPNESS", 5.0)
    monkeypatch.setattr(initial, "QUIET", 0.0)
    target = even_target()
    drafter, copied = start(target, (0, 1, 2), num_hidden_layers=4, num_key_value_heads=4)
    assert copied == [0, 1, 2]
    tokens = torch.randint(0, VOCABULARY, (12,))
    with torch.no_grad():
        aux = torch.randn(12, 3 * WIDTH, dtype=torch.float64)
        ntp = drafter.ntp_forward(tokens, aux, torch.arange(12), document_lengths=[12])
        ours = torch.log_softmax(drafter.logits(ntp.hidden), -1)
        theirs = torch.log_softmax(target(tokens[None]).logits[0], -1)
    assert (ours - theirs).abs().max() < 0.02 * theirs.abs().max()


@torch.no_grad()
def test_query_heads_that_share_keys_pass_the_embedding_on_once():
    drafter = make_drafter(num_attention_heads=8, num_key_value_heads=4)
    layer, embedding = drafter.layers[0], torch.randn(1, WIDTH, dtype=torch.float64)
    open_entrance(layer, scale=torch.tensor(1.0))
    query, key, value = layer.self_attn(
        torch.cat([embedding, torch.randn(1, WIDTH).double()], -1), drafter.ops
    )
    assert torch.allclose(query[:, ::2], key) and torch.allclose(query[:, 1::2], key)
    assert torch.allclose(key, SHARPNESS * value)
    context = value.repeat_interleave(2, 1)  # every head looks at the slot itself
    assert torch.allclose(layer.self_attn.o_proj(context.flatten(1)), embedding)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_key_value_heads": 2},
        {"intermediate_size": 48, "num_key_value_heads": 4},
        {"norm_before_residual": True, "num_key_value_heads": 4},
    ],
)
def test_where_the_target_layers_cannot_serve_the_deepest_state_is_passed_on(changes):
    drafter, copied = start(even_target(), (0, 1, 2), **changes)
    assert copied == []
    assert (drafter.fc.weight[:, -WIDTH:].diagonal() - 1).abs().mean() < 0.5


def test_the_first_and_the_last_layers_are_chosen():
    kept = TargetLayers({index: {} for index in (0, 4, 5)})
    assert kept.choose(3) == kept.choose(9) == [0, 4, 5]
    assert kept.choose(2) == [0, 5]
    assert kept.choose(1) == [0]
    assert kept.choose(0) == []
    assert default_start_layers(36) == (0, 33, 34, 35)
    assert default_start_layers(1) == (0,)


def test_layers_come_back_from_disk_and_damage_is_named(tmp_path):
    target, path = make_target(), tmp_path / "target_layers.safetensors"
    layers = target_layers_of(target, target.config, (0, 3))
    layers.save(path)
    back = TargetLayers.load(path)
    assert list(back.layers) == [0, 3]
    for index, name in ((0, "mlp.up_proj.weight"), (3, "self_attn.k_proj.weight")):
        assert torch.equal(back.layers[index][name], layers.layers[index][name])
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is corrupt"):
        TargetLayers.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        TargetLayers.load(tmp_path / "none.safetensors")


def test_layers_that_compute_something_else_are_not_copied():
    target = make_target()
    target.config.hidden_act = "gelu"
    assert target_layers_of(target, target.config, (0,)).layers == {}
