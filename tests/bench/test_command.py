"""``bench`` from its options to its files, and every way in which it can fail."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from paths import ROOT
from PIL import Image
from random_parts import make_drafter
from transformers import LlamaConfig

from peagle.bench.run import BenchConfig, bench
from peagle.capture.prompts import PromptSource
from peagle.card.run_files import sha256
from peagle.serve.export import export_drafter
from peagle.serve.server import EngineError
from peagle.target.target import TargetSource

PROMPTS = [PromptSource("stdlib", "test", limit=3)]
# What design and card know of a row; the file is an interface.
KEYS = {
    *(
        "prompt_set",
        "method",
        "k",
        "temperature",
        "engine",
        "hardware",
        "dtype",
        "prompts",
        "requests",
    ),
    *("tokens", "acceptance_length", "per_position", "lossless_prompts", "tokens_per_second"),
    *("baseline_tokens_per_second", "concurrency", "drafter", "latency_p50_s", "latency_p95_s"),
    *("latency_p99_s", "ttft_p50_s", "speedup"),
}


@pytest.fixture(autouse=True)
def keep_signals():
    """``bench`` decides what these signals do; give them back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def exported(folder, **changes):
    """A drafter for the embedded target, trained for K up to 6 as it says."""
    target = TargetSource("tiny").config()
    made = make_drafter(
        vocab_size=target.vocab_size,
        target_hidden_size=target.hidden_size,
        num_depths=6,
        **changes,
    )
    export_drafter(made.to(torch.bfloat16), folder)
    return folder


@pytest.fixture
def drafter(tmp_path):
    return exported(tmp_path / "run" / "drafter")


def small(drafter, vllm, **changes):
    settings = {"prompts": PROMPTS, "k": (3,), "concurrency": (1,), "max_new_tokens": 24, **changes}
    return BenchConfig(drafter, target="tiny", vllm_python=vllm.python, **settings)


def test_every_k_and_concurrency_gets_a_row_beside_no_drafter(drafter, stand_in, capsys):
    vllm = stand_in()
    (drafter.parent / "provenance.json").touch()
    bench(small(drafter, vllm, k=(3, 5), concurrency=(1, 2)))
    metrics = drafter.parent / "metrics"
    written = json.loads((metrics / "bench.json").read_text())
    rows = written["rows"]
    assert written["provenance"]["weights_sha256"] == sha256(drafter / "model.safetensors")
    assert [(row["concurrency"], row["k"]) for row in rows] == [
        *((1, None), (1, 3), (1, 5)),
        *((2, None), (2, 3), (2, 5)),
    ]
    for row in rows:
        assert row.keys() == KEYS
        assert (row["engine"], row["prompts"]) == ("vLLM 0.32.0 (cpu)", 3)
        assert row["tokens"] == 24 * row["requests"]
        if row["k"]:
            accepted = {3: 2, 5: 3}[row["k"]]
            assert row["acceptance_length"] == 1 + accepted
            assert row["per_position"] == [1.0] * accepted + [0.0] * (row["k"] - accepted)
            assert row["lossless_prompts"] == 3 and row["speedup"] > 1
    for name in ("bench_throughput.png", "bench_acceptance.png"):
        with Image.open(metrics / name) as image:
            assert image.width > 800
    shown = capsys.readouterr().out
    assert shown.count("best for stdlib-test with") == 2
    run = drafter.parent
    assert f"for the card: python -m peagle.card.card {run} {drafter} {run}/card --opt" in shown
    assert "cores\nbfloat16, temperature 0, at most 24 new tokens\n" in shown
    assert vllm.gone()


def test_later_turns_are_requests_of_their_own_the_same_for_every_k(drafter, stand_in, tmp_path):
    path = tmp_path / "talks.jsonl"
    path.write_text('{"turns": ["def a():", "def b():"]}\n{"turns": ["def c():"]}\n')
    bench(small(drafter, stand_in(), prompts=[PromptSource(str(path))]))
    rows = json.loads((drafter.parent / "metrics" / "bench.json").read_text())["rows"]
    assert [(row["k"], row["prompts"]) for row in rows] == [(None, 3), (3, 3)]
    # The stand-in's tokens depend on the prompt: equal outputs were equal prompts.
    assert rows[1]["lossless_prompts"] == 3


def test_a_baseline_is_served_in_its_own_way_and_gets_its_rows(drafter, stand_in, tmp_path, capsys):
    vllm, baseline = stand_in(), exported(tmp_path / "other", parallel_drafting=False)
    bench(small(drafter, vllm, k=(3, 5), baseline=baseline))
    document = json.loads((drafter.parent / "metrics" / "bench.json").read_text())
    found = [(row["method"], row["k"], row["drafter"]) for row in document["rows"]]
    assert found == [
        (None, None, None),
        *(("p-eagle", k, str(drafter)) for k in (3, 5)),
        *(("eagle3", k, str(baseline)) for k in (3, 5)),
    ]
    assert document["provenance"]["baseline"] == str(baseline)
    shown = capsys.readouterr()
    assert "eagle3, K = 5: starting the engine" in shown.err
    assert "stdlib-test (3)        1   eagle3  3" in shown.out
    assert vllm.gone()


def test_a_k_above_the_trained_depth_is_measured_with_a_warning(drafter, stand_in, capsys):
    bench(small(drafter, stand_in(), k=(9,)))
    assert "warning: the drafter was trained for K up to 6; its further guesses at K = 9" in (
        capsys.readouterr().err
    )
    rows = json.loads((drafter.parent / "metrics" / "bench.json").read_text())["rows"]
    assert [row["k"] for row in rows] == [None, 9]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        ({"version": None}, r"has no vLLM: install vLLM 0\.16 or newer"),
        ({"version": "0.15.1"}, r"vLLM 0\.15\.1 is too old: parallel drafting needs vLLM 0\.16"),
        (
            {"architectures": ["LlamaForCausalLM"]},
            "does not know the architecture LlamaForCausalLMEagle3: use a vLLM of 0.16 or newer",
        ),
        (
            {"architectures": ["LlamaForCausalLMEagle3"]},
            "does not know the architecture LlamaForCausalLM: use a vLLM of 0.16 or newer",
        ),
    ],
    ids=["missing", "too old", "without the drafter", "without the target"],
)
def test_a_vllm_that_cannot_serve_it_is_refused_before_it_starts(drafter, stand_in, found, words):
    vllm = stand_in(**found)
    with pytest.raises(ValueError, match=words):
        bench(small(drafter, vllm))
    assert not vllm.served


def test_sampling_is_refused_where_vllm_draws_wrong_tokens(drafter, stand_in):
    vllm = stand_in()
    with pytest.raises(ValueError, match="draws wrong tokens for sampled requests"):
        bench(replace(small(drafter, vllm), temperature=0.7))
    assert not vllm.served


def test_a_vllm_that_cannot_be_imported_says_why(drafter, tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: libcudart.so.12' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(ValueError, match=r"cannot be imported \(ImportError: libcudart\.so\.12\)"):
        bench(BenchConfig(drafter, target="tiny", vllm_python=str(broken)))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": 1 << 17}, "another target: vocab_size"),
        ({"hidden_size": 384}, "another target: hidden_size"),
        ({"num_hidden_layers": 2}, "another target: number of layers 3, this one has 2"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_drafter_of_another_target_is_refused_before_the_engine_starts(
    drafter, stand_in, tmp_path, changes, words
):
    right = TargetSource("tiny").config().to_dict()
    LlamaConfig(**{**right, **changes}).save_pretrained(tmp_path / "other")
    vllm = stand_in()
    config = BenchConfig(drafter, target=str(tmp_path / "other"), vllm_python=vllm.python)
    with pytest.raises(ValueError, match=words):
        bench(config)
    assert not vllm.served


def test_an_engine_that_dies_at_its_start_shows_its_last_lines(drafter, stand_in):
    vllm = stand_in("dies at its start")
    with pytest.raises(
        EngineError, match="ended with status 1 at its start; its last lines:\nValueError: no room"
    ):
        bench(small(drafter, vllm))
    assert vllm.served and vllm.gone()


def test_an_engine_that_does_not_come_up_is_ended_and_shows_its_last_lines(drafter, stand_in):
    vllm = stand_in("does not come up")
    with pytest.raises(EngineError, match="not come up in 2 s; its last lines:\nloading weights"):
        bench(small(drafter, vllm, start_timeout_s=2.0))
    assert vllm.served and vllm.gone()


def test_an_engine_that_dies_at_a_k_leaves_the_rows_before_it_and_no_process(drafter, stand_in):
    vllm = stand_in("dies with the drafter")
    with pytest.raises(
        EngineError, match="died while it was asked; its last lines:\nEngineDeadError: out of mem"
    ):
        bench(small(drafter, vllm))
    rows = json.loads((drafter.parent / "metrics" / "bench.json").read_text())["rows"]
    assert [row["k"] for row in rows] == [None]
    assert vllm.gone()


def test_an_engine_that_serves_without_the_drafter_is_found_out(drafter, stand_in):
    vllm = stand_in("serves without the drafter")
    with pytest.raises(OSError, match="counted no drafts: it served without the drafter"):
        bench(small(drafter, vllm))
    assert vllm.gone()


@pytest.mark.parametrize(
    ("behaviour", "number"),
    [
        ("does not come up", signal.SIGTERM),
        pytest.param("never answers", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("never answers", signal.SIGHUP, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_command_and_its_engine_at_once(drafter, stand_in, behaviour, number):
    vllm = stand_in(behaviour)
    command = [sys.executable, "-m", "peagle", "bench", "--drafter", str(drafter), "--target=tiny"]
    with subprocess.Popen(
        [*command, "--vllm_python", vllm.python],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # Jobs in the background ignore it, and their children with them.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as process:
        try:
            while len(vllm.processes()) < 3 and process.poll() is None:  # it, server, its child
                time.sleep(0.1)
            time.sleep(1.0)
            process.send_signal(number)
            assert process.wait(60) == 128 + number
        finally:
            process.kill()
    assert vllm.served and vllm.gone()
