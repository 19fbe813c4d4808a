"""A stand-in for an interpreter with vLLM, for what a real engine does not do on demand: being
too old, dying, hanging. Real engines are asked in ``tests/vllm``.

Called with ``-c`` it answers the probe, called with ``-m`` it is the server, with a child process
as vLLM has. Its tokens depend on the prompt alone, and of K drafts it accepts (K + 1) // 2. Hidden
states that it hands out are noise of token and place, and its log probabilities are those that the
embedded target's head gives them. It notes what it is asked.
"""

import json
import os
import sys
import time
from importlib import resources
from pathlib import Path
from typing import NamedTuple

FOUND = {
    "version": "0.32.0",
    "architectures": ["LlamaForCausalLM", "LlamaForCausalLMEagle3"],
    "device": "cpu",
    "device_name": "cpu",
    "named_vllm": False,
    "openmp": None,
    "writes_states": True,
}
SCRIPT = """#!{python}
import http.server, json, os, pathlib, subprocess, sys, threading, time
if sys.argv[1] == "-c":
    print("INFO a line of log")
    print(json.dumps({found}))
    sys.exit()
pathlib.Path(__file__).with_name("served").touch()
behaviour, arguments = {behaviour!r}, sys.argv[3:]
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
if behaviour == "dies at its start":
    sys.exit("ValueError: no room for the cache")
if behaviour == "does not come up":
    print("loading weights", flush=True)
    time.sleep(600)
port, k, lock = int(arguments[arguments.index("--port") + 1]), 0, threading.Lock()
if "--speculative-config" in arguments:
    given = json.loads(arguments[arguments.index("--speculative-config") + 1])
    k = given["num_speculative_tokens"]
layers, folder, read_before = 0, None, []
if k and given["method"] == "extract_hidden_states":
    k, layers = 0, len(given["draft_model_config"]["hf_config"]["eagle_aux_hidden_state_layer_ids"])
    transfer = json.loads(arguments[arguments.index("--kv-transfer-config") + 1])
    folder = pathlib.Path(transfer["kv_connector_extra_config"]["shared_storage_path"])
    import numpy, safetensors.numpy
if not k and behaviour == "dies with the drafter":
    behaviour = ""
per_round, count = 1 + (k + 1) // 2, dict(rounds=0, asked=0)
def states_of(text):
    rows = [numpy.random.default_rng(token + 1000 * i).normal(size=(layers, 192))
            for i, token in enumerate(text)]
    return numpy.array(rows, dtype="float32")
def hand_out(text, number):
    path, states = folder / ("%d.safetensors" % number), states_of(text)
    if behaviour == "hands out other tokens":
        text = [token + 1 for token in text]
    if behaviour == "hands out constants":
        states = numpy.ones_like(states)
    if behaviour == "takes text from its cache":
        states += any(before[: len(text)] == text for before in read_before)
        read_before.append(text)
    if behaviour != "writes to another folder":
        path.with_name(path.name + ".lock").touch()
        tensors = dict(hidden_states=states, token_ids=numpy.array(text))
        safetensors.numpy.save_file(tensors, path)
    return dict(hidden_states_path=str(path))
def likely(text, tokens):
    content = pathlib.Path({weights!r}).read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    def tensor(name):
        start, stop = (8 + size + offset for offset in header[name]["data_offsets"])
        half = numpy.frombuffer(content[start:stop], dtype="uint16").astype("uint32") << 16
        return half.view("float32").reshape(header[name]["shape"])
    final = states_of(text)[-len(tokens) :, -1]
    normed = final / numpy.sqrt((final**2).mean(-1, keepdims=True) + 1e-6)
    logits = (normed * tensor("model.norm.weight")) @ tensor("model.embed_tokens.weight").T
    logits *= 2 if behaviour == "serves another model" else 1
    logits -= numpy.log(numpy.exp(logits).sum(-1, keepdims=True))
    best = numpy.argsort(-logits)[:, :5]
    found = [{{"token_id:%d" % i: float(row[i]) for i in ids}} for row, ids in zip(logits, best)]
    return dict(top_logprobs=found)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/v1/models":
            self.send_response(200); self.end_headers()
            return self.wfile.write(json.dumps(dict(data=[dict(id="target")])).encode())
        lines = []
        if k and self.path == "/metrics" and behaviour != "serves without the drafter":
            name, rounds = "vllm:spec_decode_num_", count["rounds"]
            lines = [name + "drafts_total{{}} %d" % rounds]
            lines += [name + "accepted_tokens_total{{}} %d" % (rounds * (per_round - 1))]
            for i in range(k):
                accepted = rounds if i < per_round - 1 else 0
                label = 'accepted_tokens_per_pos_total{{position="%d"}}' % i
                lines += [name + "%s %d" % (label, accepted)]
        self.send_response(200); self.end_headers()
        self.wfile.write("\\n".join([*lines, ""]).encode())
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with lock, open(pathlib.Path(__file__).with_name("asked"), "a") as notes:
            notes.write(json.dumps(asked) + "\\n")
            count["asked"] += 1
            number = count["asked"]
        if behaviour == "dies after two answers" and number > 2 + 2 * bool(layers):
            time.sleep(2)
            print("EngineDeadError: out of memory", flush=True); os._exit(9)
        if behaviour == "dies with the drafter":
            print("EngineDeadError: out of memory", flush=True); os._exit(9)
        self.send_response(200); self.end_headers()
        if behaviour == "never answers":
            time.sleep(600)
        tokens = [(sum(asked["prompt"]) + i) % 97 for i in range(asked["max_tokens"])]
        if not asked.get("stream"):
            choice, reply = dict(token_ids=tokens), {{}}
            if layers and behaviour != "hands out nothing":
                answered = bool(asked.get("kv_transfer_params"))
                text = asked["prompt"] + tokens[:-1] * answered
                reply["kv_transfer_params"] = hand_out(text, number)
                if asked.get("logprobs"):
                    choice["logprobs"] = likely(text, tokens)
            self.wfile.write(json.dumps(dict(choices=[choice], **reply)).encode())
            return
        for start in range(0, len(tokens), per_round):
            time.sleep(0.01)
            with lock:
                count["rounds"] += 1
            new = tokens[start : start + per_round]
            event = dict(choices=[dict(token_ids=new)])
            self.wfile.write(("data: " + json.dumps(event) + "\\n\\n").encode())
        self.wfile.write(b"data: [DONE]\\n\\n")
    def log_message(self, *a):
        pass
http.server.ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


class StandIn(NamedTuple):
    """The path to give as ``--vllm_python``, and what became of it."""

    python: str

    @property
    def served(self) -> bool:
        """Whether a server was ever started."""
        return Path(self.python).with_name("served").exists()

    def asked(self) -> list[dict]:
        """The requests since this was last called."""
        notes = Path(self.python).with_name("asked")
        found = [json.loads(line) for line in notes.read_text().splitlines()]
        notes.unlink()
        return found

    def processes(self) -> list[int]:
        """Living processes that this script or its server started."""
        mark = f"PEAGLE_STAND_IN={self.python}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                marked = mark in path.read_bytes().split(b"\0")
                state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if marked and state != "Z" and int(path.parent.name) != os.getpid():
                found.append(int(path.parent.name))
        return found

    def gone(self) -> bool:
        """Whether nothing is left; those just killed get a moment to go."""
        for _ in range(200):
            if not self.processes():
                return True
            time.sleep(0.1)
        return False


def make_stand_in(folder: Path, behaviour: str = "", **found) -> StandIn:
    """Write the script; ``found`` changes what it says of its vLLM."""
    path = folder / "python"
    answer = repr({**FOUND, **found})
    weights = str(resources.files("peagle.tiny_target") / "model.safetensors")
    path.write_text(
        SCRIPT.format(python=sys.executable, found=answer, behaviour=behaviour, weights=weights)
    )
    path.chmod(0o755)
    return StandIn(str(path))
