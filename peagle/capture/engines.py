"""The engines that a capture asks: one that it starts itself, or several that run already."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

from peagle.capture.config import CaptureConfig
from peagle.serve.http import Address, is_healthy, request
from peagle.serve.vllm import (
    MODEL_NAME,
    Serving,
    States,
    Vllm,
    absolute,
    find_vllm,
    require_architectures,
    serve,
)
from peagle.store.manifest import Manifest
from peagle.target.target import TargetSource

Result = TypeVar("Result")
TRIES = 3  # of a request, at engines that are well
PAUSE_S = 1.0
START_TIMEOUT_S = 3600.0  # it may have to fetch the weights


class Engine(NamedTuple):
    address: Address
    model: str = MODEL_NAME


class Engines:
    """Shares requests out; what one engine lost is asked of another, and a dead one no more."""

    def __init__(self, engines: list[Engine]):
        self.alive, self.busy, self.lock = list(engines), Counter[Engine](), Lock()

    def ask(self, question: Callable[[Engine], Result]) -> Result:
        """Raises ``OSError`` if no engine is left, or all that are well fail three times."""
        tries = 0
        while True:
            with self.lock:
                engine = min(self.alive, key=self.busy.__getitem__)
                self.busy[engine] += 1
            try:
                return question(engine)
            except OSError as error:
                tries += 1
                if not self.goes_on_without(engine) or tries == TRIES:
                    raise
                lost = f"engine {engine.address}: {error}"
                print(f"{lost.splitlines()[0]}; what it was asked is asked again", flush=True)
                time.sleep(PAUSE_S)
            finally:
                with self.lock:
                    self.busy[engine] -= 1

    def goes_on_without(self, engine: Engine) -> bool:
        """Forget an engine that is dead; false if none is left then."""
        dead = not is_healthy(engine.address)
        with self.lock:
            if dead and engine in self.alive and len(self.alive) > 1:
                self.alive.remove(engine)
                return True
            return not (dead and engine in self.alive)


def running_engines(urls: list[str]) -> list[Engine]:
    """Engines that somebody else started, each with the name of the model that it serves.

    Raises:
        ValueError: for an address that cannot be one, or where no engine answers.
    """
    engines = []
    for url in urls:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname or parts.path.strip("/"):
            raise ValueError(f"a server must be given as http://HOST:PORT, got {url!r}")
        address = f"{parts.hostname}:{parts.port or 80}"
        try:
            with request(address, "GET", "/v1/models", timeout_s=30.0) as response:
                models = json.loads(response.read())["data"]
            engines.append(Engine(address, models[0]["id"]))
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            raise ValueError(
                f"no engine answers at {url} ({error}): start it, or leave it out"
            ) from error
    return engines


@contextmanager
def own_engine(vllm: Vllm, serving: Serving, states_folder: Path) -> Iterator[Engines]:
    """A server that lives as long as the block, as do the files of states.

    Raises:
        EngineError: if the engine does not come up, or dies; with its last lines.
    """
    shutil.rmtree(states_folder, ignore_errors=True)  # a killed capture may have left files
    states_folder.mkdir(parents=True)
    try:
        with serve(vllm, serving, timeout_s=START_TIMEOUT_S) as server:
            yield Engines([Engine(server.port)])
    finally:
        shutil.rmtree(states_folder, ignore_errors=True)


def find_able_vllm(target: TargetSource, config: CaptureConfig) -> Vllm:
    """Raises ``ValueError`` if there is no vLLM that can serve the target and hand out states."""
    vllm = find_vllm(config.vllm_python, option="--capture.vllm_python")
    text = target.config()
    require_architectures(vllm, text.architectures or ())
    if not vllm.writes_states:
        raise ValueError(
            f"{vllm.name} cannot hand out hidden states (vllm-project/vllm#33736 brought it): "
            "install a newer one, or capture with --capture.engine transformers"
        )
    if getattr(text, "kv_lora_rank", None):
        raise ValueError(
            "vLLM hands out no hidden states of targets with latent attention (MLA): capture with "
            "--capture.engine transformers"
        )
    return vllm


def serving(
    target: TargetSource, config: CaptureConfig, vllm: Vllm, manifest: Manifest, folder: Path
) -> Serving:
    """The target alone, in the precision and up to the length of the capture.

    The cache of prefixes is off: vLLM hands out no states for what it holds (vllm #44485).

    Args:
        folder: for the files of hidden states.
    """
    return Serving(
        target=absolute(target.path),
        revision=target.revision,
        drafter=None,
        parallel=False,
        k=0,
        dtype=config.dtype,
        max_model_len=config.max_tokens,
        enforce_eager=vllm.device == "cpu",
        prefix_caching=False,
        arguments=tuple(config.vllm_args),
        states=States((*manifest.layer_ids, manifest.num_layers), str(folder.resolve())),
    )
