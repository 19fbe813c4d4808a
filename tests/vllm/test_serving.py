"""The real engine serves what we export: it loads, changes no output, and accepts what we say.

Run by ``make test-vllm``, which makes vLLM's environment; another one is named by the variable
PEAGLE_VLLM_PYTHON.
"""

import http.client
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from lab import CASES, HERE, NEW_TOKENS, ROOT, Engines, K, Lab, peagle, shares

from peagle.bench.client import Question, ask, read_counters
from peagle.bench.engine import EngineError, Server, Serving, find_vllm, free_port, serve
from peagle.decoding import Decoder
from peagle.evaluation import per_position
from peagle.metrics import format_table
from peagle.model.drafter import PEagleDrafter
from peagle.model.target import TargetSource, end_tokens

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]

EMBEDDED = next(iter(CASES))
PRUNED = "tiny target, 2 layers, pruned, fc_norm"
BOTH = [(name, k) for name in CASES for k in K]
IDS = [f"{name}, K = {k}" for name, k in BOTH]


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
def vllm_python():
    chosen = os.environ.get("PEAGLE_VLLM_PYTHON", str(ROOT / ".venv-vllm" / "bin" / "python"))
    assert Path(chosen).exists(), f"{chosen} does not exist: run `make test-vllm`"
    return chosen


@pytest.fixture(scope="session")
def environment():
    """Of engines: no network, and no more memory than a small machine can give."""
    ours = {"HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    return {**os.environ, **ours}


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


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
    """With three tokens to an answer, nearly all that K = 7 accepts lies behind its end."""
    target = TargetSource(lab.target("tiny")).model(dtype=torch.float32, device="cpu")
    drafter = PEagleDrafter.from_pretrained(lab.run(EMBEDDED) / "drafter", dtype=torch.float32)
    decoder = Decoder(target, drafter.eval(), eos_ids=end_tokens(target))
    decoded = decoder.decode(lab.prompts("tiny"), k=7, temperature=0.0, max_new_tokens=3)
    ours = per_position(decoded.accepted, 7)
    assert ours[3] > 0.05
    counters = engines.drafted(EMBEDDED, 7, max_new_tokens=3)["counters"]
    assert counters["drafts"] == sum(map(len, decoded.accepted))
    assert shares(counters) == pytest.approx(ours, abs=0.02)


def test_the_speculators_folder_alone_answers_a_chat_with_the_drafter_at_work(
    vllm_python, environment, lab, tmp_path
):
    run = lab.run(PRUNED)
    options = {"ckpt_path": run / "checkpoints" / "last.ckpt", "out": tmp_path / "drafter"}
    peagle("export", {**options, "format": "speculators", "target": "tiny", "k": 4})
    port = free_port()
    command = [vllm_python, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(tmp_path / "drafter"), "--enforce-eager", "--port", str(port)]
    with Server(command, port, environment=environment, timeout_s=1800):
        question = 'def first(items):\n    """Return the first item."""'
        answer = chat(port, str(tmp_path / "drafter"), question)
        counters = read_counters(port)
    assert len(answer["choices"][0]["message"]["content"]) > 10
    assert len(counters.per_position) == 4
    assert counters.drafts > 0 and counters.accepted > 0


def chat(port, model, question):
    body = {"model": model, "messages": [{"role": "user", "content": question}], "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    assert response.status == 200, text
    return json.loads(text)


def test_bench_measures_the_real_engine_with_and_without_the_drafter(vllm_python, lab, tmp_path):
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
    shown = peagle("bench", options)
    rows = json.loads((tmp_path / "metrics" / "bench.json").read_text())["rows"]
    assert [(row["concurrency"], row["k"]) for row in rows] == [
        (1, None),
        (1, 5),
        (4, None),
        (4, 5),
    ]
    for alone, drafted in (rows[:2], rows[2:]):
        assert alone["engine"] == drafted["engine"] and alone["engine"].startswith("vLLM 0.")
        assert alone["tokens"] == drafted["tokens"] > 100
        assert drafted["lossless_prompts"] == drafted["prompts"] == 8
        assert drafted["acceptance_length"] > 1.2 and len(drafted["per_position"]) == 5
        assert 0 < drafted["ttft_p50_s"] < drafted["latency_p50_s"] <= drafted["latency_p99_s"]
    assert shown.count("best for stdlib-test with") == 2
    for name in ("bench_throughput.png", "bench_acceptance.png"):
        assert (tmp_path / "metrics" / name).read_bytes().startswith(b"\x89PNG")


def test_an_engine_that_dies_shows_its_last_lines_and_leaves_no_process(
    vllm_python, environment, lab, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    serving = Serving(
        target=lab.target("llama"),
        revision=None,
        drafter=None,
        k=0,
        dtype="float32",
        max_model_len=None,
        enforce_eager=True,
        arguments=(),
    )
    with (
        pytest.raises(EngineError, match="the engine died while it was asked; its last lines:\n"),
        serve(find_vllm(vllm_python), serving, timeout_s=1800) as server,
    ):
        group = server.process.pid
        for process in processes(group)[1:]:
            os.kill(process, signal.SIGKILL)
        ask(server.port, Question([5, 6, 7], 500, 0.0))
    assert processes(group) == []


def processes(group):
    """The living processes of a group, its head first."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, member_of = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(member_of) == group and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found, key=lambda process: (process != group, process))
