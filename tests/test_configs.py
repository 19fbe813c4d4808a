"""Every shipped configuration parses, is complete, and says how to run it."""

import json
import re
import sys

import pytest
import yaml
from paths import ROOT

from peagle.cli import PEagleCLI, lightning
from peagle.shipped_configs import format_configs, head_of

CONFIGS = sorted(ROOT.glob("configs/*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_parses_and_prints_itself(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["peagle"])
    with pytest.raises(SystemExit) as end:
        lightning(PEagleCLI, ["fit", "--config", str(path), "--print_config"])
    assert end.value.code in (0, None)
    printed, written = yaml.safe_load(capsys.readouterr().out), yaml.safe_load(path.read_text())
    for key in ("target", "run_dir", "store"):
        assert printed[key] == written[key]
    assert printed["model"]["cod"] == {"min_keep_ratio": 0.0, **written["model"]["cod"]}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # between Lightning and jsonargparse
@pytest.mark.parametrize("name", ["lightning.pytorch.loggers.CSVLogger", "TensorBoardLogger",
                                  "WandbLogger"])  # fmt: skip
def test_a_logger_of_lightning_is_added_by_its_name_and_writes_into_the_run(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["peagle"])
    monkeypatch.setattr(PEagleCLI, "instantiate_classes", lambda self: None)
    parsed = []
    monkeypatch.setattr(PEagleCLI, "_run_subcommand", lambda self, _: parsed.append(self.config))
    path = str(ROOT / "configs/quickstart.yaml")
    lightning(PEagleCLI, ["fit", "--config", path, f"--trainer.logger+={name}"])
    ours, added = parsed[0].fit.trainer.logger
    assert ours.class_path == "peagle.callbacks.progress.TrainCsv"
    assert ours.init_args.run_dir == added.init_args.save_dir == "outputs/quickstart"
    assert added.class_path.endswith(name)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_starts_with_command_hardware_and_disk(path):
    text = path.read_text()
    assert text.startswith(f"# python -m peagle fit --config {path.stem}\n")
    assert {"Hardware", "Disk", "Expected"} <= head_of(text).keys()


def test_the_list_and_the_page_of_recipes_give_target_and_depth_of_each_configuration():
    shown, page = format_configs(), (ROOT / "docs/recipes.md").read_text()
    for path in CONFIGS:
        written = yaml.safe_load(path.read_text())
        depths = written["model"]["cod"]["num_depths"]
        assert re.search(rf"^{path.stem} +K {depths} +{written['target']}$", shown, re.MULTILINE)
        assert re.search(rf"^\| `configs/{path.name}` \|.*\| {depths} \|$", page, re.MULTILINE)
    assert "8 GPUs with 141 GB\n" in shown  # without the remark in brackets
    assert "disk: 0.5 TB for 30,000 conversations of 2,048 tokens\n" in shown


def test_the_baseline_trains_on_the_store_of_the_quickstart_and_is_measured_alike():
    ours, baseline = (
        yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text())
        for name in ("quickstart", "eagle3")
    )
    assert baseline["model"]["drafter"] == "eagle3"
    for key in ("seed_everything", "target", "store", "capture", "data", "evaluation"):
        assert baseline[key] == ours[key], key
    assert baseline["model"]["cod"]["num_depths"] == ours["model"]["cod"]["num_depths"]
    assert baseline["trainer"]["max_epochs"] == ours["trainer"]["max_epochs"]


TARGETS = {
    "smollm2_135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "qwen3_0_6b": "Qwen/Qwen3-0.6B",
    "llama3_1_8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3_8b": "Qwen/Qwen3-8B",
    "gpt_oss_20b": "openai/gpt-oss-20b",
    "gpt_oss_120b": "openai/gpt-oss-120b",
    "qwen3_coder_30b": "Qwen/Qwen3-Coder-30B-A3B-Instruct",
    "gemma_4_31b": "google/gemma-4-31B-it",
    "long_context": "openai/gpt-oss-20b",
}


def test_there_is_a_configuration_for_every_target_that_is_promised():
    assert {path.stem for path in CONFIGS} == {"quickstart", "paper", "eagle3", *TARGETS}


@pytest.mark.parametrize("name", TARGETS)
def test_a_targets_configuration_says_what_it_costs_and_what_to_aim_at(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()
    head = head_of(text)
    assert {"Reference", "Mask token"} <= head.keys() and "not measured" in head["Expected"]
    written = yaml.safe_load(text)
    assert written["target"] == TARGETS[name]
    assert written["run_dir"] == f"outputs/{name}"
    assert written["trainer"]["logger"] == {"class_path": "peagle.callbacks.progress.TrainCsv"}
    shape = json.loads((ROOT / f"tests/helpers/target_configs/{name}/config.json").read_text())
    vocab_size = shape.get("text_config", shape)["vocab_size"]
    assert 0 < written["model"]["mask_token_id"] < vocab_size
    states = len(written["capture"].get("layer_ids") or [2, "middle", -3]) + 1  # and the last
    kilobytes = states * shape.get("text_config", shape)["hidden_size"] * 2 / 1000
    disk = re.match(r"([\d.]+) ([TG])B for (\S+) .* of (\S+) tokens \((\d+) KB", head["Disk"])
    total, conversations, tokens, each = (float(disk[i].replace(",", "")) for i in (1, 3, 4, 5))
    assert each == round(kilobytes)
    gigabytes = total * {"T": 1000, "G": 1}[disk[2]]
    assert gigabytes == pytest.approx(conversations * tokens * kilobytes / 1e6, rel=0.05)
    assert written["capture"]["max_tokens"] <= written["data"]["max_tokens"]
    assert max(written["evaluation"]["k"]) <= written["model"]["cod"]["num_depths"]


def test_the_papers_recipe_differs_from_the_quickstarts_in_training_alone():
    paper, ours = (yaml.safe_load((ROOT / f"configs/{n}.yaml").read_text())
                   for n in ("paper", "quickstart"))  # fmt: skip
    for section in ("target", "store", "capture", "data", "evaluation", "seed_everything"):
        assert paper[section] == ours[section]
    model = paper["model"]
    assert model["cod"] == {"num_depths": 8, "keep_ratio": 0.8, "min_keep_ratio": 0.0}
    assert (model["num_layers"], model["start"], model["loss"]) == (4, "random", {"ce": 1.0})
    assert model["optimizer"]["init_args"]["lr"] == 1e-4
    assert model["lr_scheduler"]["init_args"] == {"warmup_ratio": 0.0025}
    assert paper["trainer"]["accumulate_grad_batches"] == 8
