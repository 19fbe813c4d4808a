"""A GGUF file becomes a target's folder that says what the file's model says."""

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from gguf import GGUFWriter, TokenType
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from peagle.card.target_license import license_of
from peagle.card.target_name import hub_name_of
from peagle.target.from_gguf import make_folder
from peagle.target.target import TargetSource

TINY = str(resources.files("peagle.tiny_target"))
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    """The embedded target as a GGUF file in float32."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", drop_tokens=0)


def write_gguf(path: Path, drop_tokens: int) -> Path:
    """``drop_tokens`` takes so many rows out of the embedding, behind the tokenizer's back."""
    config = AutoConfig.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    writer = GGUFWriter(path, "llama")
    writer.add_license("apache-2.0")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size - drop_tokens)
    add_tokenizer(writer)
    weights = model.state_dict()
    rows = config.vocab_size - drop_tokens
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"][:rows].numpy())
    writer.add_tensor("output.weight", weights["lm_head.weight"][:rows].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for theirs, name in NAMES.items():
            weight = as_gguf_orders(
                weights[f"model.layers.{layer}.{theirs}.weight"], theirs, config
            )
            writer.add_tensor(f"blk.{layer}.{name}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_gguf_orders(weight: Tensor, name: str, config: LlamaConfig) -> Tensor:
    """GGUF's Llama keeps the two halves that rotary turns together side by side."""
    heads = {
        "self_attn.q_proj": config.num_attention_heads,
        "self_attn.k_proj": config.num_key_value_heads,
    }.get(name)
    if heads is None:
        return weight
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def add_tokenizer(writer: GGUFWriter) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    saved = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in range(len(tokenizer))]
    special = set(tokenizer.all_special_ids)
    kinds = [TokenType.CONTROL if i in special else TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = saved["model"]["merges"]
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def test_a_folder_says_what_its_file_says(file, tmp_path):
    folder = tmp_path / "targets" / "tiny"
    make_folder(file, folder, hub_id="you/tiny")
    source, original = TargetSource(str(folder)), TargetSource("tiny")
    ids = torch.arange(4, 60)[None]
    with torch.no_grad():
        ours, theirs = (
            target.model(dtype=torch.float32, device="cpu")(ids).logits
            for target in (source, original)
        )
    torch.testing.assert_close(ours, theirs)
    assert source.end_tokens() == original.end_tokens()
    assert source.tokenizer().chat_template == original.tokenizer().chat_template
    assert license_of("tiny", str(folder), None) == "apache-2.0"
    assert hub_name_of(folder).hub_id == "you/tiny"
    assert list(tmp_path.glob("targets/*")) == [folder]  # nothing unfinished is left beside it


def test_what_cannot_become_a_target_is_refused_in_a_sentence(file, tmp_path):
    text = tmp_path / "text.gguf"
    text.write_text("not a model")
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:200_000])
    torn = write_gguf(tmp_path / "torn.gguf", drop_tokens=12)
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "notes.txt").write_text("keep")
    out = tmp_path / "out" / "folder"
    for source, folder, sha256, sentence in (
        (tmp_path / "none.gguf", out, None, "does not exist"),
        (text, out, None, "is no GGUF file"),
        (file, out, "0" * 64, "is another file"),
        (cut, out, None, "transformers cannot read"),
        (torn, out, None, "its tokenizer has 512 ids, its embedding 500 rows"),
        (file, taken, None, "give another folder"),
    ):
        with pytest.raises(ValueError, match=sentence):
            make_folder(source, folder, sha256=sha256)
    assert not list(out.parent.glob("*")) and (taken / "notes.txt").read_text() == "keep"


def test_a_file_as_target_is_sent_to_the_command_that_makes_its_folder():
    with pytest.raises(ValueError, match=r"peagle\.target\.from_gguf m\.gguf FOLDER"):
        TargetSource("m.gguf").config()


def test_a_disk_without_room_is_known_before_weights_are_read(file, tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="GB free"):
        make_folder(file, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
