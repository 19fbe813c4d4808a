"""A shipped configuration runs on a local folder of its family, with nothing but paths changed."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from chat_templates import QWEN3
from paths import ROOT
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from peagle.store.reader import Store
from peagle.target.target import TargetSource

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
CONFIG = ROOT / "configs" / "qwen3_0_6b.yaml"


def write_qwen3(folder):
    """Qwen3-0.6B's configuration made small; its vocabulary, and so its mask token, is kept.

    The tokenizer is the embedded one with a template that has Qwen3's features, so tokens beyond
    its 512 are never said. After a token the next one is likely, and every 31st ends an answer:
    what a random model says would not end.
    """
    path = ROOT / "tests/helpers/target_configs/qwen3_0_6b/config.json"
    published = json.loads(path.read_text())
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
             "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
             "layer_types": None, "max_window_layers": 4, "tie_word_embeddings": False}  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**{**published, **small})).to(torch.bfloat16)
    tokenizer = TargetSource("tiny").tokenizer()
    with torch.no_grad():
        embedding, head = model.model.embed_tokens.weight, model.lm_head.weight
        embedding.normal_()
        head.zero_()
        head[1 : len(tokenizer)] = embedding[: len(tokenizer) - 1]
    ends = list(range(7, len(tokenizer), 31))
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=0)
    model.save_pretrained(folder)
    tokenizer.chat_template = QWEN3
    tokenizer.save_pretrained(folder)


def write_prompts(path, count):
    rows = [
        {"messages": [{"role": "system", "content": "Be brief."},
                      {"role": "user", "content": f"What is {n} + {n}?"},
                      {"role": "assistant", "content": "somebody else's"},
                      {"role": "user", "content": "And twice that?"}]}
        for n in range(count)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"[{{source: {path}}}]"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3")
    write_qwen3(folder / "target")
    arguments = [
        *("--target", folder / "target", "--run_dir", folder / "run", "--store", folder / "store"),
        *("--capture.prompts", write_prompts(folder / "asked.jsonl", 96)),
        *("--evaluation.prompts", write_prompts(folder / "held_out.jsonl", 2)),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "peagle", "fit", "--config", CONFIG, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,
    )
    assert result.returncode == 0, result.stderr
    return folder


def test_a_run_needs_no_more_than_paths(finished):
    store, run = Store(finished / "store"), finished / "run"
    assert store.manifest.vocab_size == 151936 and store.manifest.hidden_size == 32
    assert len(store) >= 96
    served = json.loads((run / "drafter" / "config.json").read_text())
    written = yaml.safe_load(CONFIG.read_text())
    assert served["vocab_size"] == 151936
    assert json.loads((run / "metrics" / "validate.json").read_text())["rows"][7]["count"] > 0
    rows = json.loads((run / "metrics" / "acceptance.json").read_text())["rows"]
    assert [row["k"] for row in rows] == written["evaluation"]["k"]
    assert all((row["prompts"], row["turns"]) == (2, 4) for row in rows)
    assert (run / "card" / "README.md").stat().st_size > 0


def test_every_turn_is_rendered_by_the_targets_own_template(finished):
    store, tokenizer = Store(finished / "store"), TargetSource(str(finished / "target")).tokenizer()
    texts = [tokenizer.decode(store.read(i).input_ids) for i in range(len(store))]
    assert any("And twice that?" in text for text in texts)
    assert all(text.startswith("<|im_start|>system\nBe brief.<|im_end|>") for text in texts)
    assert not any("somebody else's" in text for text in texts)
