"""The command line as a person meets it: help, one-line errors, the whole run in small."""

import json
import re
import subprocess
import sys
import time
from typing import NamedTuple

import lightning  # noqa: F401  first loaded in a test, it would log to that test's stderr for ever
import pytest
import yaml
from paths import ROOT

from peagle import next_step
from peagle.__main__ import main
from peagle.serve.export_command import verifier_name
from peagle.store.locks import locked
from peagle.target.target import TargetSource

quiet = pytest.mark.filterwarnings("ignore")  # of Lightning and jsonargparse


def process(*arguments, timeout=280):
    """``python -m peagle`` as a user starts it; most of its seconds are imports."""
    return subprocess.run(
        [sys.executable, "-m", "peagle", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


class Ended(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def peagle(monkeypatch, capsys):
    """The same command line in this process, which has everything imported."""

    def call(*arguments):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", ["peagle", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        return Ended(code, *capsys.readouterr())

    return call


def test_help_answers_at_once_and_lists_the_commands():
    begin = time.monotonic()
    result = process("--help")
    assert time.monotonic() - begin < 3
    assert result.returncode == 0
    for command in ("fit", "validate", "test", "capture", "plan", "export", "bench", "publish",
                    "configs"):  # fmt: skip
        assert re.search(rf"^  {command} +\w+", result.stdout, re.MULTILINE)


def test_an_unknown_command_is_answered_with_the_known_ones():
    result = process("train")
    assert result.returncode == 2
    assert "no command 'train'" in result.stderr and "validate" in result.stderr


def test_bench_takes_its_options_with_dashes_too_and_refuses_a_folder_without_a_drafter(
    peagle, tmp_path
):
    result = peagle("bench", "--drafter", tmp_path, "--target=tiny", "--vllm-python=/env/python")
    assert result.returncode == 1
    assert result.stderr == (
        f"peagle: {tmp_path} is not a servable drafter: it has no config.json\n"
    )


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """A whole fit of seconds: capture, train, validate, test, export, card."""
    folder = tmp_path_factory.mktemp("run")
    overrides = [
        *("--run_dir", folder / "run", "--store", folder / "store"),
        *("--capture.prompts", "[{source: stdlib, split: train, limit: 24}]"),
        *("--capture.val_share", 0.3, "--capture.max_new_tokens", 16, "--trainer.max_steps", 6),
        *("--model.num_layers", 1, "--evaluation.max_new_tokens", 16),
        *("--evaluation.prompts", "[{source: stdlib, split: test, limit: 3}]"),
        *("--capture.dtype", "float32", "--trainer.precision", "32-true"),  # bf16 may be slow
    ]
    result = process("fit", "--config", "configs/quickstart.yaml", *overrides)
    assert result.returncode == 0, result.stderr
    return folder, overrides, result


def test_fit_leaves_everything_the_design_names(small_run):
    folder, _, result = small_run
    run = folder / "run"
    for name in ("config.yaml", "checkpoints/last.ckpt", "drafter/config.json", "provenance.json",
                 "drafter/model.safetensors", "metrics/train.csv", "card/README.md"):  # fmt: skip
        assert (run / name).stat().st_size > 0, name
    assert "Per-depth accuracy" in result.stdout and "Acceptance length" in result.stdout


def test_the_figures_of_a_run_have_the_promised_keys(small_run):
    metrics = small_run[0] / "run" / "metrics"
    validate = json.loads((metrics / "validate.json").read_text())
    assert {"provenance", "rows", "teacher_forced_acceptance_length", "loss"} <= validate.keys()
    assert [row["depth"] for row in validate["rows"]] == list(range(7))
    assert validate["rows"][0].keys() == {"depth", "accuracy", "conditional_accuracy", "count"}
    acceptance = json.loads((metrics / "acceptance.json").read_text())
    assert [row["k"] for row in acceptance["rows"]] == [3, 5, 7]
    for row in acceptance["rows"]:
        assert row["lossless_prompts"] == row["prompts"] == 3
        assert len(row["per_position"]) == row["k"]
        assert row["tokens_per_second"] > 0 and row["baseline_tokens_per_second"] > 0
        assert row["acceptance_length"] == pytest.approx(1 + sum(row["per_position"]))


@quiet
def test_validate_and_test_run_again_from_the_checkpoint(small_run, peagle, tmp_path):
    folder, overrides, _ = small_run
    kept = [folder / "run" / "config.yaml", folder / "run" / "metrics" / "train.csv"]
    before = [path.read_bytes() for path in kept]
    prompts = tmp_path / "own.jsonl"
    prompts.write_text('{"prompt": "def add(a, b):"}\n{"prompt": "def pop(self):"}\n')
    result = peagle(
        "test", "--config", "configs/quickstart.yaml", *overrides, "--ckpt_path", "last",
        "--evaluation.prompts", f"[{{source: {prompts}}}]", "--evaluation.k", "[2]",
        "--model.init_from", tmp_path / "gone",  # what the run started from is not read again
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((folder / "run" / "metrics" / "acceptance.json").read_text())["rows"]
    assert [(row["prompt_set"], row["k"], row["prompts"]) for row in rows] == [("own", 2, 2)]
    result = peagle("validate", "--config", "configs/quickstart.yaml", *overrides,
                    "--ckpt_path", folder / "run" / "checkpoints" / "last.ckpt")  # fmt: skip
    assert result.returncode == 0 and "given prefix right" in result.stdout
    typed = [*overrides, "--ckpt_path", folder / "run" / "checkpoints" / "last.ckpt"]
    test = next_step.command("test", "--config", "configs/quickstart.yaml", *typed)
    assert result.stdout.endswith(f"next:\n{test}\n")  # as it was typed, and nothing else
    assert [path.read_bytes() for path in kept] == before


def test_export_writes_both_layouts(small_run, peagle, tmp_path):
    checkpoint = small_run[0] / "run" / "checkpoints" / "last.ckpt"
    for layout, extra in (("eagle3", []), ("speculators", ["--target", "tiny"])):
        out = tmp_path / layout
        result = peagle(
            "export", "--ckpt_path", checkpoint, "--out", out, "--format", layout, *extra
        )
        assert result.returncode == 0, result.stderr
        assert {path.name for path in out.iterdir()} == {"config.json", "model.safetensors"}


@quiet
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--target", "./nowhere"], "target './nowhere' cannot be opened"),
        (["--capture.prompts", "[{source: ./none.jsonl}]"], "none.jsonl does not exist"),
        (["--model.cod.num_depths", "0"], "num_depths must be at least 1, got 0"),
        (["--model.cod.keep_ratio", "1.5"], "keep_ratio must lie in (0, 1], got 1.5"),
        (["--ckpt_path", "nowhere.ckpt"], "checkpoint nowhere.ckpt does not exist"),
        (
            ["--ckpt_path", "tests"],
            "is a folder: give a checkpoint, as tests/checkpoints/last.ckpt",
        ),
        (["--trainer.max_steps", "0"], "trainer.max_steps is 0, and nothing would be trained"),
        (["--trainer.gradient_clip_val", "-1"], "gradient_clip_val must not be negative"),
        (["--trainer.default_root_dir", "x"], "leave out trainer.default_root_dir"),
        (["--trainer.max_time", "00:00:00:00"], "trainer.max_time is 0"),
        (
            ["--trainer.callbacks+=Timer", "--trainer.callbacks.duration", "00:00:00:00"],
            "nothing would be trained",
        ),
        (["--trainer.barebones", "true"], "trainer.barebones switches off"),
        (
            ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor", "val_loss"],
            "EarlyStopping wants 'val_loss', which is never logged: give one of train/loss, ",
        ),
        (["--capture.dtype", "fp32"], "Expected a typing.Literal['float32', 'bfloat16', "),
        (["--capture.layer_ids", "[5, 2]"], "layer_ids must be ascending"),
        (["--capture.part", "0/2"], "capture.part is for `peagle capture`"),
        (["--trainer.accelerator", "gpu"], "this configuration asks for a GPU"),
        (["--trainer.enable_progress_bar", "false"], "leave one of the two out"),
        (["--trainer.devices", "-3"], "should be an int > 0"),
        (["--trainer.callbacks+=LearningRateMonitor", "--trainer.logger", "false"], "a logger"),
        (["--model.init_from", "/nowhere"], "model.init_from: there is no folder /nowhere"),
        (["--model.num_layers", "0"], "num_layers must be at least 1, got 0"),
        (["--model.optimizer.init_args.lr", "-1"], "earning rate"),
        (["--evaluation.device", "nowhere"], "there is no device 'nowhere' here"),
        (["--model.nothing", "1"], "unrecognized arguments: --model.nothing 1"),
        (["--run_dir", __file__], "test_cli.py is a file, and a folder is needed"),
    ],
)
def test_bad_input_is_one_clear_sentence(peagle, tmp_path, arguments, words):
    result = peagle(
        "fit", "--config", "configs/quickstart.yaml",
        "--run_dir", tmp_path / "run", "--store", tmp_path / "store", *arguments,
    )  # fmt: skip
    assert result.returncode == 1
    told = result.stderr.splitlines()[-1]
    assert told.startswith("peagle: ") and words in told
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "store" / "manifest.json").exists()


@quiet
def test_two_fits_do_not_write_into_one_folder(small_run, peagle):
    folder, overrides, _ = small_run
    with locked(folder / "run" / ".fit.lock"):
        result = peagle("fit", "--config", "configs/quickstart.yaml", *overrides)
    assert result.returncode == 1
    assert "another fit is writing into" in result.stderr.splitlines()[-1]


@quiet
def test_plan_and_capture_say_what_fit_will_refuse(peagle, tmp_path):
    places = ("--config", "configs/quickstart.yaml", "--store", tmp_path / "s")
    result = peagle(
        "plan", *places, "--run_dir", tmp_path / "run",
        "--capture.prompts", "[{source: stdlib, limit: 20}]", "--answers", 1, "--seconds", 0.01,
        "--model.optimizer", "torch.optim.SparseAdam",
        "--evaluation.prompts", "[{source: ./none.jsonl}]",
    )  # fmt: skip
    assert "fit will refuse: SparseAdam takes" in result.stdout
    assert "fit will refuse: prompt file none.jsonl does not exist" in result.stdout
    result = peagle("capture", *places, "--run_dir", tmp_path, "--model.mask_token_id", "512")
    assert "mask_token_id must lie in 0..511, got 512" in result.stderr
    assert not (tmp_path / "s").exists()


def test_the_speculators_layout_names_a_target_in_a_folder_as_its_card_does(tmp_path, capsys):
    config = tmp_path / "config.json"
    for written, name, said in (
        ({"_name_or_path": "org/model"}, "org/model", "org/model, after _name_or_path of"),
        ({}, str(tmp_path), f"its folder on this machine, {tmp_path}"),
    ):
        config.write_text(json.dumps(written))
        assert verifier_name(TargetSource(str(tmp_path)), "speculators") == name
        assert f"names the target by {said}" in capsys.readouterr().err
    assert verifier_name(TargetSource("org/model"), "speculators") == "org/model"


@quiet
def test_a_prompt_set_of_the_command_line_inherits_nothing(peagle):
    result = peagle(
        "fit", "--config", "configs/qwen3_0_6b.yaml", "--print_config",
        "--evaluation.prompts", "[{source: x.jsonl}, {source: y.jsonl}, {source: z.jsonl}]",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    for prompt_set in yaml.safe_load(result.stdout)["evaluation"]["prompts"]:
        assert {key for key, value in prompt_set.items() if value is not None} == {"source"}


def test_bad_input_ends_the_process_with_the_same_sentence_alone(tmp_path):
    result = process("export", "--ckpt_path", tmp_path / "nowhere.ckpt", "--out", tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith("peagle: ") and result.stderr.count("\n") == 1
    assert "nowhere.ckpt does not exist" in result.stderr
