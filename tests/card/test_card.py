"""The card: what stands on it is in the files of the run, and nothing else is."""

import ast
import copy
import dataclasses
import hashlib
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from card_runs import (
    ACCEPTANCE,
    DRAFTER,
    PROVENANCE,
    RUNS,
    SHA,
    VALIDATE,
    acceptance_row,
    block,
    card,
    eagle3_run,
    embedded_run,
    empty_run,
    folder_run,
    full_run,
    make_run,
    outline,
    section,
    tables_in,
)
from huggingface_hub import ModelCard

from peagle.card.card import CardOptions, render, write_card
from peagle.card.run_files import RunFiles, sha256


@pytest.mark.parametrize("run", RUNS)
def test_the_hub_client_reads_the_card_and_writes_it_back_unchanged(run):
    page = card(run)
    parsed = ModelCard(page)
    assert parsed.content == page
    assert parsed.data.pipeline_tag == "text-generation"
    assert {"p-eagle", "eagle3", "speculative-decoding", "vllm"} <= set(parsed.data.tags)
    assert "arxiv:2602.01469" in parsed.data.tags
    assert parsed.text.startswith("\n# P-EAGLE drafter for ")


def test_a_target_on_the_hub_is_the_base_model():
    data = ModelCard(card(full_run)).data
    assert data.base_model == "Qwen/Qwen3-8B"
    assert data["base_model_relation"] == "adapter"
    assert data.license == "apache-2.0"
    assert data.datasets == ["openai/openai_humaneval"]  # "stdlib functions" is no data set there


@pytest.mark.parametrize(
    ("run", "words"),
    [(embedded_run, "ships inside the `peagle` package"), (folder_run, "`my llama`, a folder")],
)
def test_a_target_that_is_not_on_the_hub_is_no_base_model_and_the_page_says_so(run, words):
    page = card(run)
    data = ModelCard(page).data.to_dict()
    assert not {"base_model", "base_model_relation"} & set(data)
    assert words in page
    assert "/home/someone" not in page


def test_a_target_in_a_folder_can_have_its_name_on_the_hub():
    given = card(folder_run, CardOptions(base_model="meta-llama/Llama-3.1-8B-Instruct"))
    assert ModelCard(given).data.base_model == "meta-llama/Llama-3.1-8B-Instruct"
    assert "# P-EAGLE drafter for meta-llama/Llama-3.1-8B-Instruct\n" in given
    words = shlex.split(block(given, "bash", "vllm serve"))
    assert words[:4][-1] == "meta-llama/Llama-3.1-8B-Instruct"
    assert "my llama" not in given


def test_the_name_that_a_run_found_in_the_folder_is_used_and_its_origin_said(tmp_path):
    run = folder_run(tmp_path)
    provenance = json.loads((run / "provenance.json").read_text())
    provenance["target"] |= {"hub_id": "Qwen/Qwen3-0.6B", "hub_id_from": "its config.json"}
    (run / "provenance.json").write_text(json.dumps(provenance))
    page = render(RunFiles.read(run, run / "drafter"))
    assert ModelCard(page).data.base_model == "Qwen/Qwen3-0.6B"
    assert "(read from a folder, and called so after its config.json)" in page


def test_a_data_set_of_two_prompt_sets_is_named_once(tmp_path):
    data = PROVENANCE["data"] | {"datasets": ["openai/gsm8k", "openai/gsm8k", "a/b"]}
    run = make_run(tmp_path, provenance=PROVENANCE | {"data": data})
    page = render(RunFiles.read(run, run / "drafter"))
    assert ModelCard(page).data.datasets == ["openai/gsm8k", "a/b"]


def test_every_measured_acceptance_is_a_result_in_the_model_index():
    results = ModelCard(card(full_run)).data.eval_results
    shown = sorted((r.dataset_name, r.metric_value) for r in results)
    assert shown == sorted((r["prompt_set"], r["acceptance_length"]) for r in ACCEPTANCE["rows"])
    assert {r.metric_type for r in results} == {"acceptance_length"}
    assert any("temperature 0.7, vllm 0.32.0, bfloat16" in r.metric_name for r in results)


@pytest.mark.parametrize("run", [embedded_run, empty_run])
def test_a_run_that_decoded_nothing_has_no_model_index(run):
    assert "model-index" not in ModelCard(card(run)).data.to_dict()


def test_the_first_line_of_facts_names_acceptance_at_the_served_depth():
    page = card(full_run)
    (line,) = [line for line in page.split("\n") if line.startswith("- **Acceptance length:**")]
    assert "**3.40** on human\\_eval, **2.61** on mt\\_bench" in line
    assert "K = 5, vllm 0.32.0, temperature 0 (greedy)" in line


@pytest.mark.parametrize("run", [embedded_run, empty_run])
def test_what_was_never_measured_says_so(run):
    page = card(run)
    assert "- **Acceptance length:** not measured\n" in page
    for title in ("Measured acceptance", "Acceptance per position", "Throughput and latency"):
        assert "*not measured*" in section(page, title)
        assert not tables_in(section(page, title))
    assert "at temperature: not measured." in page


def test_every_recorded_fact_is_on_the_page(tmp_path):
    page = card(full_run)
    facts = dict(row.values() for table in tables_in(page) for row in table if len(row) == 2)
    expected = {
        "Layers": "4", "Width": "2,048", "Feed-forward width": "6,144", "Attention heads": "32",
        "Key-value heads": "8", "Head size": "64", "Target architecture": "Qwen3ForCausalLM",
        "Target width": "4,096", "Target layers whose input states are read": "2, 18, 33",
        "Target vocabulary": "151,936", "Draft vocabulary": "32,000", "Mask token id": "`151669`",
        "Norm before residual": "no", "Norm before fc": "no", "Norm per target layer": "yes",
        "Longest position": "40,960", "Data sets": "openai/openai_humaneval, stdlib functions",
        "Prompts": "1,500", "Samples": "1,490", "Tokens in the store": "765,432",
        "Supervised tokens in the store": "543,210", "Depths K": "5", "COD keep ratio": "0.8",
        "COD keep ratio, floor": "0", "Loss": "kl", "Optimizer": "AdamW",
        "Learning rate": "0.0003", "Steps": "1,234", "Batches per step": "4",
        "Tokens per batch, at most": "8,192", "Tokens trained on": "9,876,543",
        "Rows trained on": "34,567,890", "Precision": "bf16-mixed", "Seed": "`17`",
        "Hours": "3.46", "Hardware": "EPYC 9R14, 16 cores · NVIDIA H200", "Run": "`run-7f3a`",
        "Date": "2026-11-22", "Data manifest, sha256": f"`{SHA}`",
        "Target revision": "`b968826d9c46dd6066d109eabc6255188de91218`",
        "Target fingerprint": "`xxh3:5d1f`", "Git commit": "`421ec65`", "peagle": "0.1.0",
        "Python": "3.11.9", "torch": "2.13.0", "lightning": "2.6.6", "transformers": "5.23.0",
        "Platform": "Linux x86_64",
        "Command": "`python -m peagle fit --config configs/qwen3.yaml --out a`",
    }  # fmt: skip
    weights = (full_run(tmp_path) / "drafter/model.safetensors").read_bytes()
    expected["Drafter weights, sha256"] = f"`{hashlib.sha256(weights).hexdigest()}`"
    assert facts == expected
    assert "parameters: 42 " in page  # 6 x 7; the vocabulary map is no parameter
    assert (
        "a share of 0.75\ngreedily, the others sampled at temperature 0.7, at most 512 new" in page
    )


def test_a_fact_that_was_not_recorded_says_so():
    page = card(empty_run)
    facts = [row for table in tables_in(page) for row in table if len(row) == 2]
    assert len(facts) > 40
    assert {cell for row in facts for cell in list(row.values())[1:]} == {"not recorded"}


def test_answers_that_the_target_did_not_make_are_not_called_its_own(tmp_path):
    data = PROVENANCE["data"] | {"regenerated": False}
    run = make_run(tmp_path, provenance=PROVENANCE | {"data": data})
    said = section(render(RunFiles.read(run, run / "drafter")), "Training")
    assert "stood in the data sets" in said and "written by the target" not in said


def test_the_folders_of_the_machine_stay_off_the_page(tmp_path):
    data = PROVENANCE["data"] | {"prompts": "stdlib, /home/someone/secret/own.jsonl"}
    run = make_run(tmp_path, provenance=PROVENANCE | {"data": data})
    page = render(RunFiles.read(run, run / "drafter"))
    assert "| Prompts | stdlib, own.jsonl |" in page and "/home" not in page


def test_the_drafter_that_training_went_on_from_is_named_twice(tmp_path):
    source = {"drafter": "/home/someone/runs/first/drafter", "weights_sha256": SHA}
    training = PROVENANCE["training"] | {"init_from": source}
    run = make_run(tmp_path, provenance=PROVENANCE | {"training": training})
    card = render(RunFiles.read(run, run / "drafter"))
    assert f"| Started from the drafter | `drafter`, weights with sha256 `{SHA}` |" in card
    assert "went on from the drafter `drafter`, whose licence matters as well" in card
    assert "someone" not in card


def test_no_gpu_and_no_record_of_one_are_told_apart():
    without = card(embedded_run)
    assert "| Hardware | EPYC 9R14, 16 cores · no GPU |" in without
    assert "| Git commit | not recorded |" in without
    assert "no GPU" not in card(empty_run)


@pytest.mark.parametrize("run", RUNS)
def test_the_card_names_no_other_method(run):
    page = card(run).lower()
    assert "p-eagle" in page
    for other in ("dflash", "dspark", "medusa", "hydra", "pard", "parallelspec", "lookahead"):
        assert other not in page


SERVED = {"method": "eagle3", "model": "someone/qwen3-p-eagle", "num_speculative_tokens": 5,
          "parallel_drafting": True}  # fmt: skip


def test_the_shell_hands_vllm_the_target_and_the_setting():
    page = card(full_run, CardOptions(repo_id="someone/qwen3-p-eagle"))
    words = shlex.split(block(page, "bash", "vllm serve"))
    assert words[:4] == ["VLLM_USE_V2_MODEL_RUNNER=0", "vllm", "serve", "Qwen/Qwen3-8B"]
    assert words[4] == "--speculative-config" and len(words) == 6
    assert json.loads(words[5]) == SERVED


def test_the_sagemaker_lines_make_an_environment_of_strings():
    page = card(full_run, CardOptions(repo_id="someone/qwen3-p-eagle"))
    names = {}
    exec(block(page, "python", "SM_VLLM"), names)
    setting = json.loads(names["env"].pop("SM_VLLM_SPECULATIVE_CONFIG"))
    assert setting == SERVED
    assert names["env"] == {"SM_VLLM_MODEL": "Qwen/Qwen3-8B", "VLLM_USE_V2_MODEL_RUNNER": "0"}


def test_the_embedded_target_is_found_by_the_shell():
    page = card(embedded_run)
    line = block(page, "bash", "vllm serve").replace("vllm serve", "printf '%s\\n'")
    python = f'python() {{ "{sys.executable}" "$@"; }}\n'
    shown = subprocess.run(
        ["bash", "-c", python + line], capture_output=True, text=True, check=True
    )
    target, flag, setting = shown.stdout.split("\n", 2)
    assert Path(target, "make.py").is_file()
    assert flag == "--speculative-config"
    assert json.loads(setting)["model"] == "./drafter"


MAKE_A_DRAFTER = """
from peagle.model.config import PEagleConfig
from peagle.model.p_eagle import PEagleDrafter

config = PEagleConfig(
    vocab_size=32, hidden_size=16, intermediate_size=16, head_dim=8, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, eagle_aux_hidden_state_layer_ids=[1, 2],
    num_depths=3,
)
PEagleDrafter(config).save_pretrained("drafter")
"""


# In a folder of its own, the template comes from the installed package.
WRITE_A_CARD = """
from pathlib import Path

from peagle.card.card import write_card
from peagle.card.run_files import EMBEDDED
from peagle.target.target import EMBEDDED as EMBEDDED_IN_PEAGLE

assert EMBEDDED == EMBEDDED_IN_PEAGLE
write_card(Path(), Path("drafter"), Path("card"))
"""


def test_the_python_snippet_imports_a_class_that_exists():
    tree = ast.parse(block(card(empty_run), "python", "from_pretrained"))
    (statement,) = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    source = Path(importlib.util.find_spec(statement.module).origin).read_text()
    classes = {node.name for node in ast.parse(source).body if isinstance(node, ast.ClassDef)}
    assert {alias.name for alias in statement.names} <= classes


@pytest.mark.slow
def test_the_python_snippet_loads_a_drafter_from_the_folder_it_names(tmp_path):
    snippet = block(card(empty_run), "python", "from_pretrained")
    assert '"./drafter"' in snippet
    script = f"{MAKE_A_DRAFTER}{snippet}assert drafter.config.num_depths == 3\n{WRITE_A_CARD}"
    command = [sys.executable, "-W", "error::ResourceWarning", "-c", script]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert "trained for K: 3" in (tmp_path / "card/README.md").read_text()


def test_the_card_of_an_eagle3_drafter_speaks_of_eagle3_and_of_its_own_figures():
    page = card(eagle3_run)
    assert page.split("---\n", 2)[2].startswith("\n# EAGLE-3 drafter for Qwen/Qwen3-8B\n")
    parsed = ModelCard(page)
    assert {"eagle3", "arxiv:2503.01840"} <= set(parsed.data.tags)
    assert not {"p-eagle", "parallel-drafting"} & set(parsed.data.tags)
    served = block(page, "bash", "vllm serve")
    assert '"method": "eagle3"' in served and "parallel_drafting" not in served
    assert "parallel_drafting" not in block(page, "python", "SM_VLLM")
    assert "import Eagle3Drafter" in block(page, "python", "from_pretrained")
    assert "Mask token id" not in page and "9.87" not in page
    outside_the_bench = page.replace(section(page, "Throughput and latency"), "")
    assert not re.search("p-eagle", outside_the_bench, re.IGNORECASE)
    (table,) = tables_in(section(page, "Throughput and latency"))
    found = [row["Drafter"] for row in table]
    assert found == ["none", "drafter (eagle3)", "drafter (p-eagle)"]


def test_without_a_depth_no_serving_line_is_guessed():
    page = card(empty_run)
    assert "vllm serve" not in page
    assert "no line is given" in page


WEIRD = [
    'evil: "yes"\n---\n# injected\n- x',
    "a|b`c``d`{{ 7 * 7 }}{% raw %}",
    "```\n</details><script>alert(1)</script>\n'; rm -rf ~; '",
    "!!python/object:os.system\u2028---\x00\t& *anchor",
    "$x_1$ \\ 名前 '\"",
]


@pytest.mark.parametrize("name", WEIRD)
def test_no_name_can_leave_its_place(name, tmp_path):
    def documents(word):
        provenance = copy.deepcopy(PROVENANCE)
        provenance["target"] |= {"name_or_path": word, "license": word, "architecture": word}
        provenance["environment"] |= {"command": word, "cpu": word, "gpu": word}
        provenance["data"]["datasets"] = [word]
        rows = [acceptance_row(word, k, 2.5, engine=word) for k in (3, 5)]
        acceptance = {"provenance": provenance["environment"], "rows": rows}
        return {"provenance": provenance, "drafter": DRAFTER, "acceptance": acceptance}

    usual = make_run(tmp_path / "usual", **documents("usual"))
    weird = make_run(tmp_path / "weird", **documents(name))
    page = render(RunFiles.read(weird, weird / "drafter"))
    assert outline(page) == outline(render(RunFiles.read(usual, usual / "drafter")))
    data = ModelCard(page).data
    assert "base_model" not in data.to_dict()
    assert data.license == "other"
    assert re.fullmatch("[a-z0-9.-]+", data["license_name"])
    assert {result.metric_value for result in data.eval_results} == {2.5}
    words = shlex.split(block(page, "bash", "vllm serve"))
    assert len(words) == 6
    assert words[4] == "--speculative-config"
    prose = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", ModelCard(page).text, flags=re.S)
    assert "<script>" not in prose


def test_a_licence_that_the_hub_does_not_know_goes_out_as_other():
    data = ModelCard(card(embedded_run)).data
    assert (data.license, data["license_name"]) == ("other", "psf-2.0")


def test_the_options_override_the_licence_and_the_relation():
    options = CardOptions(license="mit", base_model_relation="finetune")
    page = card(full_run, options)
    data = ModelCard(page).data
    assert (data.license, data["base_model_relation"]) == ("mit", "finetune")
    said = section(page, "Licence")
    assert "Licence of the target: apache-2.0." in said
    assert "Licence of this repository: mit." in said


def test_a_licence_that_nobody_knows_is_said_to_be_unknown_wherever_it_is_asked_for():
    page = card(folder_run)
    assert "license" not in ModelCard(page).data.to_dict()
    assert "- **Licence:** unknown: none was found for the target, and none was given\n" in page
    said = section(page, "Licence")
    assert "Licence of the target: unknown." in said
    assert "Licence of this repository: unknown." in said and "ask whoever made the target" in said
    given = section(card(folder_run, CardOptions(license="mit")), "Licence")
    assert "Licence of the target: unknown." in given
    assert "Licence of this repository: mit." in given


@pytest.mark.parametrize(
    ("option", "value"),
    [("base_model_relation", "cousin"), ("repo_id", "no owner"), ("base_model", "llama")],
)
def test_an_option_that_the_hub_would_refuse_is_refused_here(option, value):
    with pytest.raises(ValueError, match=f"{option} must .*{value}"):
        CardOptions(**{option: value})


@pytest.mark.parametrize("name", ["validate", "acceptance", "bench"])
def test_figures_of_other_weights_than_the_drafters_stay_off_the_card(tmp_path, name):
    full_run(tmp_path)
    path = tmp_path / f"metrics/{name}.json"
    document = json.loads(path.read_text())
    counts = []
    for weights in (sha256(tmp_path / "drafter/model.safetensors"), "of an earlier fit"):
        document["provenance"]["weights_sha256"] = weights
        path.write_text(json.dumps(document))
        counts.append(len(getattr(RunFiles.read(tmp_path, tmp_path / "drafter"), name).rows))
    assert counts == [len(document["rows"]), 0]


def test_a_torn_metrics_file_is_named_and_leaves_the_old_card_alone(tmp_path):
    make_run(tmp_path, validate=VALIDATE)
    write_card(tmp_path, tmp_path / "drafter", tmp_path / "card")
    before = (tmp_path / "card/README.md").read_text()
    (tmp_path / "metrics/validate.json").write_text('{"rows": [{"dep')
    with pytest.raises(ValueError, match=r"validate\.json is not valid JSON .* run the command"):
        write_card(tmp_path, tmp_path / "drafter", tmp_path / "card")
    assert (tmp_path / "card/README.md").read_text() == before


def test_rendering_reads_no_file(tmp_path):
    run_files = RunFiles.read(full_run(tmp_path), tmp_path / "drafter")
    shutil.rmtree(tmp_path)
    assert "**3.40** on human\\_eval" in render(run_files)
    other = dataclasses.replace(run_files, run_id="run-0000")
    assert render(other) == render(run_files).replace("run-7f3a", "run-0000")
