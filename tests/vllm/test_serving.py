"""The real engine serves what we export: it loads, changes no output, and accepts what we say.

Run by ``make test-vllm``, which makes vLLM's environment; another one is named by the variable
PEAGLE_VLLM_PYTHON.
"""

import json
import shutil
import subprocess

import pytest
import torch
from http_server import talk_and_kill
from lab import CASES, HERE, LAYOUT, NEW_TOKENS, Engines, Lab, peagle, shares
from safetensors.torch import load_file, save_file

from peagle.bench.run import BenchConfig, bench
from peagle.decode.acceptance import per_position
from peagle.decode.decoder import Decoder
from peagle.model.p_eagle import PEagleDrafter
from peagle.target.end_tokens import end_tokens
from peagle.target.target import TargetSource
from peagle.train.metrics import format_table

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]

EMBEDDED = "tiny target, 4 layers"
PRUNED = "tiny target, 2 layers, pruned, fc_norm"
BOTH = [(name, k) for name in CASES for k in LAYOUT]
IDS = [f"{name}, {LAYOUT[k]}, K{k}" for name, k in BOTH]


class Agreement:
    """Collects what test and engine measured, and shows it at the end of the run."""

    def __init__(self):
        self.lines = []

    def note(self, name, k, rounds, ours, theirs):
        worst = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
        self.lines.append(
            [name, str(k), str(rounds), f"{1 + sum(ours):.3f}", f"{1 + sum(theirs):.3f}",
             " ".join(f"{share:.3f}" for share in ours),
             " ".join(f"{share:.3f}" for share in theirs), f"{100 * worst:.2f}"]
        )  # fmt: skip

    def pytest_terminal_summary(self, terminalreporter):
        if self.lines:
            header = ["drafter", "K", "rounds", "length, test", "length, vLLM"]
            header += ["by position, test", "by position, vLLM", "most apart (points)"]
            terminalreporter.section("acceptance: peagle test and vLLM on the same prompts")
            terminalreporter.write_line(format_table(header, self.lines))


@pytest.fixture(scope="session")
def agreement(pytestconfig):
    collected = Agreement()
    pytestconfig.pluginmanager.register(collected)
    return collected


@pytest.fixture(scope="session")
def lab(request, tmp_path_factory):
    lab = Lab(tmp_path_factory.mktemp("lab"))
    chosen = [getattr(item, "callspec", None) for item in request.session.items]
    named = [spec.params["name"] for spec in chosen if spec and "name" in spec.params]
    lab.begin(dict.fromkeys(named))
    yield lab
    lab.close()


@pytest.fixture(scope="session")
def engines(vllm_python, environment, lab):
    with (
        open(lab.folder / "engines.log", "w") as log,
        subprocess.Popen(
            [vllm_python, str(HERE / "engines.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env={**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            text=True,
        ) as process,
    ):
        yield Engines(process, lab)
        process.stdin.close()


@pytest.fixture(scope="session")
def talk(vllm_python, environment, lab):
    """What became of a server that was given the folder and nothing else."""
    folder = lab.run(PRUNED) / "speculators"
    question = 'def first(items):\n    """Return the first item."""'
    return talk_and_kill(vllm_python, folder, question, environment)


@pytest.mark.parametrize(("name", "k"), BOTH, ids=IDS)
def test_the_engine_writes_the_same_tokens_with_and_without_the_drafter(engines, name, k):
    alone, drafted = engines.alone(CASES[name].target), engines.drafted(name, k)
    assert sum(map(len, alone["tokens"])) > 500
    assert drafted["tokens"] == alone["tokens"]
    assert drafted["counters"]["drafts"] > 200


@pytest.mark.parametrize(("name", "k"), BOTH, ids=IDS)
def test_the_engine_accepts_what_peagle_test_measured(engines, lab, agreement, name, k):
    counters, ours = engines.drafted(name, k)["counters"], lab.tested(name, k)["per_position"]
    theirs = shares(counters)
    agreement.note(name, k, counters["drafts"], ours, theirs)
    assert theirs == pytest.approx(ours, abs=0.02)
    assert theirs[0] > 0.2  # else agreement would say nothing


def test_drafts_accepted_after_the_last_token_count_in_the_engine_as_in_ours(engines, lab):
    """With two tokens to an answer, all drafts but the first lie behind its end."""
    source = TargetSource(lab.target("tiny"))
    target = source.model(dtype=torch.float32, device="cpu")
    folder = lab.run(EMBEDDED) / "drafter"
    drafter = PEagleDrafter.from_pretrained(folder, dtype=torch.float32)
    decoder = Decoder(target, drafter.eval(), eos_ids=end_tokens(target, source.tokenizer()))
    decoded = decoder.decode(lab.prompts("tiny"), k=7, temperature=0.0, max_new_tokens=2)
    ours = per_position(decoded.accepted, 7)
    rounds = sum(map(len, decoded.accepted))
    assert ours[1] > 0  # else there is nothing that could be left out
    answer = engines.ask("tiny", engines.plain("tiny", folder, 7), max_new_tokens=2)
    assert answer["counters"]["drafts"] == rounds
    assert shares(answer["counters"]) == pytest.approx(ours, abs=0.5 / rounds)


def test_a_folder_that_lacks_a_tensor_is_refused_by_us_where_the_engine_serves_it(
    engines, lab, vllm_python, tmp_path
):
    shutil.copytree(lab.run(PRUNED) / "drafter", tmp_path / "drafter")
    path = tmp_path / "drafter" / "model.safetensors"
    tensors = load_file(path)
    del tensors["layers.1.mlp.down_proj.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"tensor layers\.1\.mlp\.down_proj\.weight is missing"):
        bench(BenchConfig(tmp_path / "drafter", target="tiny", vllm_python=vllm_python))
    served = engines.ask("tiny", engines.plain("tiny", tmp_path / "drafter", 3))
    assert served["tokens"] == engines.alone("tiny")["tokens"]
    assert served["counters"]["drafts"] > 200


def test_the_speculators_folder_alone_answers_a_chat_with_the_drafter_at_work(talk):
    assert len(talk.answer["choices"][0]["message"]["content"]) > 10
    assert len(talk.counters.per_position) == 5
    assert talk.counters.drafts > 0 and talk.counters.accepted > 0


def test_a_server_whose_engine_is_killed_shows_its_last_lines_and_leaves_no_process(talk):
    assert talk.killed > 0
    assert talk.failure.startswith("the engine died while it was asked; its last lines:\n")
    assert talk.left == []


def test_bench_measures_the_real_engine_with_and_without_the_drafter(
    vllm_python, environment, lab, tmp_path
):
    options = {
        "drafter": lab.run(EMBEDDED) / "drafter",
        "target": "tiny",
        "vllm-python": vllm_python,
        "run_dir": tmp_path,
        "k": [5],
        "concurrency": [1, 4],
        "max_new_tokens": NEW_TOKENS,
        "dtype": "float32",
        "prompts": [{"source": "stdlib", "split": "test", "limit": 8}],
    }
    shown = peagle("bench", options, environment)
    rows = json.loads((tmp_path / "metrics" / "bench.json").read_text())["rows"]
    found = [(row["concurrency"], row["k"]) for row in rows]
    assert found == [(1, None), (1, 5), (4, None), (4, 5)]
    for alone, drafted in (rows[:2], rows[2:]):
        assert alone["engine"] == drafted["engine"] and alone["engine"].startswith("vLLM 0.")
        assert alone["tokens"] == drafted["tokens"] > 100
        assert drafted["lossless_prompts"] == drafted["prompts"] == 8
        assert drafted["acceptance_length"] > 1.2 and len(drafted["per_position"]) == 5
        assert 0 < drafted["ttft_p50_s"] < drafted["latency_p50_s"] <= drafted["latency_p99_s"]
    assert shown.count("best for stdlib-test with") == 2
    for name in ("bench_throughput.png", "bench_acceptance.png"):
        assert (tmp_path / "metrics" / name).read_bytes().startswith(b"\x89PNG")
