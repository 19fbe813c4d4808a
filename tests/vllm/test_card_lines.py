"""The serving lines of a card, run as they stand, start the real engine with a drafter at work."""

import os
import shlex
import sys
from importlib import resources
from pathlib import Path

import hub_fits
import pytest
from card_runs import block

from peagle.bench.client import Question, ask, read_counters
from peagle.serve.server import Server, free_port
from peagle.serve.vllm import MODEL_NAME

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(3600)]

PYTHON = os.environ.get("PEAGLE_VLLM_PYTHON", str(hub_fits.ROOT / ".venv-vllm/bin/python"))
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
K = hub_fits.SMALL["model"]["cod"]["num_depths"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder with its drafter and its card."""
    folder = tmp_path_factory.mktemp("card-lines")
    ended = hub_fits.peagle(
        "fit", "--config", hub_fits.write_config(folder / "run", folder / "store")
    )
    assert ended.returncode == 0, ended.stderr
    return folder / "run"


def assert_drafting(script: str) -> None:
    """Run the lines in a shell; the CPU build's package has no ``vllm`` command of its own."""
    port = free_port()
    more = f"--port {port} --served-model-name {MODEL_NAME} --enforce-eager"
    server = f"{shlex.quote(PYTHON)} -m vllm.entrypoints.openai.api_server"
    commands = (
        f'python() {{ {shlex.quote(sys.executable)} "$@"; }}\n'
        f'vllm() {{ shift; {server} --model "$@" {more}; }}\n'
    )
    shell = ["bash", "-c", commands + script]
    with Server(shell, port, environment=ENVIRONMENT, timeout_s=1800.0):
        assert len(ask(port, Question([5, 6, 7], 24, 0.0)).tokens) > 0
        counters = read_counters(port)
    assert counters.drafts > 0 and len(counters.per_position) == K


def test_the_vllm_line_of_the_card_serves_the_drafter(run):
    line = block((run / "card/README.md").read_text(), "bash", "vllm serve")
    assert_drafting(f"cd {shlex.quote(str(run))}\n{line}")


def test_the_sagemaker_lines_of_the_card_serve_the_drafter(run):
    """The container turns every SM_VLLM_NAME into --name, and mounts the target."""
    names: dict = {}
    exec(block((run / "card/README.md").read_text(), "python", "SM_VLLM"), names)
    environment = names["env"]
    assert environment.pop("SM_VLLM_MODEL") == "/opt/ml/model"
    flags = [shlex.quote(str(resources.files("peagle.tiny_target")))]
    for name, value in environment.items():
        if name.startswith("SM_VLLM_"):
            flag = "--" + name.removeprefix("SM_VLLM_").lower().replace("_", "-")
            flags += [flag, shlex.quote(value)]
    runner = environment["VLLM_USE_V2_MODEL_RUNNER"]
    script = f"cd {shlex.quote(str(run))}\nVLLM_USE_V2_MODEL_RUNNER={runner} vllm serve "
    assert_drafting(script + " ".join(flags))
