"""The engine's life cycle with small real servers, and what is refused before one starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from paths import ROOT
from random_parts import make_drafter

from peagle.bench.client import Question, ask
from peagle.bench.run import BenchConfig, bench, warn_beyond_training
from peagle.kernels.environment import CACHE_LIMITS
from peagle.serve.export import export_drafter
from peagle.serve.server import EngineError, Server, free_port
from peagle.serve.vllm import (
    Serving,
    States,
    Vllm,
    find_vllm,
    require_parallel_drafting,
    serve,
    server_command,
    server_environment,
)

VLLM = Vllm("/env/bin/python", "0.32.0", ("LlamaForCausalLMEagle3", "LlamaForCausalLM"), "cpu",
            "cpu", False, "/env/lib/libiomp5.so", True)  # fmt: skip
SERVING = Serving("/models/t", None, "/runs/drafter", True, 5, "bfloat16", None, True, False, ())

# A server with a child of its own, as vLLM has; answers /health, dies when asked anything else.
SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.end_headers()
    def do_POST(self):
        print("out of memory: %d" % child.pid, flush=True); os._exit(9)
    def log_message(self, *a): pass
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def server(code, timeout_s=30.0):
    port = free_port()
    command = [sys.executable, "-c", code, str(port)]
    return Server(command, port, environment=dict(os.environ), timeout_s=timeout_s)


def alive(group):
    """Whether any process of a group still runs; those just killed get a moment to go."""
    for _ in range(50):
        if not members(group):
            return False
        time.sleep(0.1)
    return True


def members(group):
    """Living processes of a group, by their states."""
    states = [stat_of(path) for path in Path("/proc").glob("[0-9]*/stat")]
    return [found for found in states if found and found[0] != "Z" and int(found[2]) == group]


def stat_of(path):
    try:
        return path.read_text().rpartition(")")[2].split()[:3]
    except OSError:
        return None


def test_a_server_is_gone_with_its_children_after_its_block():
    with server(SERVER) as running:
        assert running.healthy()
        group = running.process.pid
    assert not alive(group)


def test_a_server_that_ends_at_its_start_shows_its_last_lines():
    code = "for i in range(40): print('line', i)\nraise SystemExit('no such model')"
    with pytest.raises(
        EngineError, match=r"(?s)status 1 at its start.*line 39\nno such model$"
    ) as e:
        with server(code):
            raise AssertionError("it must not come up")
    assert "line 20" not in str(e.value)


def test_a_server_that_does_not_come_up_in_time_is_ended():
    waiting = server("import time; print('loading', flush=True); time.sleep(600)", timeout_s=1.5)
    with pytest.raises(EngineError, match=r"(?s)did not come up in 2 s.*loading"):
        with waiting:
            raise AssertionError("it must not come up")
    assert not alive(waiting.process.pid)


def test_a_server_that_dies_while_asked_shows_its_last_lines_and_leaves_no_child():
    running = server(SERVER)
    with pytest.raises(EngineError, match="died while it was asked; its last lines:\nout of mem"):
        with running:
            ask(running.port, Question([1], 1, 0.0))
    assert not alive(running.process.pid)


# What starts the server, and is then killed; it says which group to look for.
ASKER = """
import os, sys, time
from peagle.serve.server import Server, free_port
port = free_port()
with Server([sys.executable, "-c", sys.argv[1], str(port)], port, environment=dict(os.environ),
            timeout_s=30.0) as server:
    print(server.process.pid, flush=True)
    time.sleep(600)
"""


def test_a_server_is_gone_with_its_children_when_who_started_it_is_killed():
    command = [sys.executable, "-c", ASKER, SERVER]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as asker:
        group = int(asker.stdout.readline())
        assert len(members(group)) == 3  # what watches, the server and its child
        asker.kill()
    assert not alive(group)


def test_an_error_of_the_asker_is_not_blamed_on_a_healthy_server():
    with pytest.raises(ValueError, match="mine"), server(SERVER):
        raise ValueError("mine")


def test_an_interpreter_without_vllm_is_answered_with_what_to_install():
    with pytest.raises(
        ValueError, match=r"has no vLLM: install vLLM 0\.16 or newer.*--vllm_python"
    ):
        find_vllm(sys.executable)


def test_an_interpreter_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "python"))):
        find_vllm(str(tmp_path / "python"))


@pytest.mark.parametrize("version", ["0.15.1", "0.9.2"])
def test_a_vllm_before_parallel_drafting_is_refused(version):
    with pytest.raises(ValueError, match=r"too old: parallel drafting needs vLLM 0\.16"):
        require_parallel_drafting(VLLM._replace(version=version), ["LlamaForCausalLM"])


@pytest.mark.parametrize("version", ["0.16.0", "0.32.0+cpu", "1.0.0rc1"])
def test_a_vllm_with_parallel_drafting_is_accepted(version):
    require_parallel_drafting(VLLM._replace(version=version), ["LlamaForCausalLMEagle3"])


def test_a_model_that_this_vllm_does_not_know_is_refused():
    with pytest.raises(ValueError, match="does not know the architecture MambaForCausalLM"):
        require_parallel_drafting(VLLM, ["MambaForCausalLM"])


def test_the_command_asks_for_parallel_drafting_and_for_nothing_without_a_drafter():
    command = server_command(VLLM, SERVING, 8000)
    assert command[:5] == ["/env/bin/python", "-m", "vllm.entrypoints.openai.api_server", "--model",
                           "/models/t"]  # fmt: skip
    assert command[command.index("--speculative-config") + 1] == (
        '{"method": "eagle3", "model": "/runs/drafter", "num_speculative_tokens": 5, '
        '"parallel_drafting": true}'
    )
    one_by_one = server_command(VLLM, SERVING._replace(parallel=False), 8000)
    assert one_by_one[one_by_one.index("--speculative-config") + 1] == (
        '{"method": "eagle3", "model": "/runs/drafter", "num_speculative_tokens": 5}'
    )
    assert "--enforce-eager" in command
    assert "--speculative-config" not in server_command(VLLM, SERVING._replace(drafter=None), 8000)


def test_where_the_package_is_named_vllm_its_own_command_line_serves():
    command = server_command(VLLM._replace(named_vllm=True), SERVING, 8000)
    assert command[1:5] == ["-m", "vllm.entrypoints.cli.main", "serve", "/models/t"]


def test_what_the_user_has_set_for_the_engine_stays():
    found = server_environment(VLLM, {"VLLM_CPU_KVCACHE_SPACE": "40", "PATH": "/bin"})
    assert found == {
        "VLLM_USE_V2_MODEL_RUNNER": "0",
        "VLLM_CPU_KVCACHE_SPACE": "40",
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "LD_PRELOAD": "/env/lib/libiomp5.so",
        "PATH": "/bin",
    }
    assert server_environment(VLLM._replace(device="cuda"), {}) == {"VLLM_USE_V2_MODEL_RUNNER": "0"}


def test_an_engine_that_hands_out_states_has_our_parts_on_a_cpu_alone():
    states = States((2, 3, 6), "/dev/shm/states")
    for device, ours in (("cpu", True), ("cuda", False)):
        vllm = VLLM._replace(device=device)
        command = server_command(vllm, SERVING._replace(drafter=None, states=states), 8000)
        method = json.loads(command[command.index("--speculative-config") + 1])
        assert method["method"] == "extract_hidden_states"
        assert method["draft_model_config"]["hf_config"] == {
            "eagle_aux_hidden_state_layer_ids": [2, 3, 6]
        }
        transfer = json.loads(command[command.index("--kv-transfer-config") + 1])
        assert transfer["kv_connector_extra_config"] == {"shared_storage_path": "/dev/shm/states"}
        assert ("kv_connector_module_path" in transfer, "--worker-cls" in command) == (ours, ours)
        path = server_environment(vllm, {"PYTHONPATH": "/mine"}, states)["PYTHONPATH"]
        assert path == (f"{ROOT / 'peagle' / 'serve' / 'in_vllm'}:/mine" if ours else "/mine")


def test_what_peagle_set_for_its_own_products_does_not_reach_the_engine():
    environment = serve(VLLM, SERVING, timeout_s=1.0).environment
    assert CACHE_LIMITS.keys() <= os.environ.keys()
    assert not CACHE_LIMITS.keys() & environment.keys()
    assert environment["PATH"] == os.environ["PATH"]


@pytest.fixture
def exported(tmp_path):
    export_drafter(make_drafter(num_depths=6).to(torch.bfloat16), tmp_path / "run" / "drafter")
    return tmp_path / "run" / "drafter"


@pytest.fixture
def keep_sigterm():
    """``bench`` decides what SIGTERM does; give it back."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.mark.usefixtures("keep_sigterm")
def test_a_drafter_of_another_target_is_refused_before_vllm_is_looked_for(exported):
    config = BenchConfig(exported, target="tiny", vllm_python="/nowhere/python")
    with pytest.raises(ValueError, match="trained for another target: vocab_size 48"):
        bench(config)


@pytest.mark.usefixtures("keep_sigterm")
def test_a_folder_without_a_drafter_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a servable drafter: it has no config\.json"):
        bench(BenchConfig(tmp_path, target="tiny"))


def test_a_k_beyond_the_trained_depth_warns(capsys):
    config = make_drafter(num_depths=6).config
    warn_beyond_training(config, (3, 6))
    assert capsys.readouterr().err == ""
    warn_beyond_training(config, (3, 7, 9))
    assert capsys.readouterr().err == (
        "warning: the drafter was trained for K up to 6; its further guesses at K = 7, 9 are "
        "untrained\n"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": []}, "bench.prompts names no prompt set"),
        ({"k": ()}, "k must list different numbers from 1 up"),
        ({"k": (3, 3)}, "k must list"),
        ({"concurrency": (0, 1)}, "concurrency must list"),
        ({"temperature": -0.5}, "must not be negative"),
    ],
)
def test_a_load_that_makes_no_sense_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        BenchConfig(Path("drafter"), target="tiny", **changes)
