"""How a store is made: the ``capture`` section of a run's YAML."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from peagle.capture.prompts import PromptSource, check_sources, prompt_set_hash

Dtype = Literal["float32", "bfloat16", "float16"]
SIZES = ("max_new_tokens", "max_tokens", "batch_size", "batch_tokens")
NOT_WITH_STATES = (
    "--enable-prefix-caching",
    "--pipeline-parallel-size",
    "-pp",
    "--speculative-config",
    "--kv-transfer-config",
)
IDENTITY_SETTINGS = (
    "max_new_tokens",
    "max_tokens",
    "greedy_share",
    "temperature",
    "seed",
    "regenerate",
    "reasoning",
    "template_options",
    "dtype",
    "val_share",
    "start_layers",
)  # with another value of these a store would be another one


@dataclass(frozen=True)
class CaptureConfig:
    """How a store is made.

    Args:
        prompts: prompt sets; only their prompts are used, the target writes the answers.
        layer_ids: hidden states to keep, in vLLM's numbering; default (2, N//2, N-3).
        start_layers: target layers that a drafter's layers can start from; default the first and
            the last three.
        max_new_tokens: length limit of an answer.
        max_tokens: longer conversations are cut at a turn; one whose first prompt leaves no room
            for an answer is left out. Both are counted.
        greedy_share: share of the answers decoded greedily; the others are sampled.
        temperature: of the sampled answers.
        batch_size: conversations answered together.
        batch_tokens: tokens (with padding) in one pass that reads hidden states.
        dtype: precision the target runs in; the store itself is bf16.
        device: where the target runs; ``auto`` is a GPU if there is one.
        val_share: share of the conversations kept for validation, by hash.
        shard_mb: size of a shard.
        seed: of the sampled answers.
        regenerate: the target answers the prompts. False takes the answers in the data, which
            should then be this target's own.
        reasoning: ``keep`` trains on the target's reasoning too; ``mask`` leaves it out of the
            loss, for targets that are served without it.
        template_options: for the chat template (``enable_thinking``, ``reasoning_effort``).
        part: of several processes that capture into one store: ``0/2`` and ``1/2`` for two.
            Each resumes by itself; the last one, or a capture without parts, completes the store.
        speculators: folder of a data set that speculators prepared and whose hidden states it
            captured: they are taken instead of prompts and answers.
        engine: who writes answers and hidden states, ``transformers`` (in two passes) or ``vllm``,
            which does both in one pass, for as many prompts at once as it has room for, whatever
            the ``batch_size``.
        vllm_python: interpreter of the environment that has vLLM; default the running one.
        vllm_args: further arguments of its server, such as ``[--tensor-parallel-size, "2"]``.
        servers: engines that already run, instead of one that the capture starts:
            ``[http://HOST:8000]``, started as docs/data.md shows. All see one folder of states.
    """

    prompts: list[PromptSource]
    layer_ids: list[int] | None = None
    start_layers: list[int] | None = None
    max_new_tokens: int = 512
    max_tokens: int = 2048
    greedy_share: float = 0.5
    temperature: float = 1.0
    batch_size: int = 32
    batch_tokens: int = 16384
    dtype: Dtype = "bfloat16"
    device: str = "auto"
    val_share: float = 0.05
    shard_mb: int = 512
    seed: int = 0
    regenerate: bool = True
    reasoning: Literal["keep", "mask"] = "keep"
    template_options: dict[str, Any] | None = None
    part: str | None = None
    speculators: str | None = None
    engine: Literal["transformers", "vllm"] = "transformers"
    vllm_python: str | None = None
    vllm_args: list[str] = field(default_factory=list)
    servers: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_sources(self.prompts, "capture")
        if not 0 <= self.greedy_share <= 1:
            raise ValueError(f"greedy_share must lie in 0..1, got {self.greedy_share}")
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share must lie between 0 and 1, got {self.val_share}")
        require_positive(self, "capture", SIZES)
        if self.greedy_share < 1 and not 0 < self.temperature < math.inf:
            raise ValueError(
                f"capture.temperature must be above 0, got {self.temperature}: for greedy answers "
                "set greedy_share: 1"
            )
        self.check_engine()

    def check_engine(self) -> None:
        """Raises ``ValueError`` for settings of an engine that is not asked, or cannot do it."""
        own = self.vllm_python or self.vllm_args
        if self.engine == "vllm" and self.speculators is not None:
            raise ValueError(
                "engine: vllm would not be asked, speculators has the states: leave it out"
            )
        if self.engine != "vllm" and (own or self.servers):
            raise ValueError(
                "vllm_python, vllm_args and servers need engine: vllm: set it, or leave them out"
            )
        if self.servers and own:
            raise ValueError(
                "servers already run, so vllm_python and vllm_args change nothing: leave them out"
            )
        for argument in self.vllm_args:
            if argument.partition("=")[0] in NOT_WITH_STATES:
                raise ValueError(
                    f"vLLM hands out hidden states without {argument} only: leave it out of "
                    "vllm_args"
                )

    @property
    def speculators_folder(self) -> Path:
        return Path(self.speculators).expanduser()

    def made_with(self) -> dict[str, Any]:
        """What the conversations and states of a store depend on, besides its target.

        Prompt sets by their content, so that an edited file is another one and a moved one is not.
        Batch sizes, device, engine and shards are left out: they change rounding, and which of
        equally likely sampled answers is drawn. So an interrupted capture may go on with another
        engine.
        """
        own = {key: getattr(self, key) for key in IDENTITY_SETTINGS}
        if self.speculators is not None:
            kept = {key: own[key] for key in ("val_share", "start_layers")}
            data = dataset_fingerprint(self.speculators_folder)
            return {"speculators": data, **kept, "prompts": {}}
        return {**own, "prompts": {source.name: prompt_set_hash(source) for source in self.prompts}}

    def answers_hash(self) -> str:
        """Identity of ``made_with``."""
        made = json.dumps(self.made_with(), sort_keys=True)
        return hashlib.sha256(made.encode()).hexdigest()[:16]

    def seed_for(self, name: str) -> int:
        """A number below 2**32 that depends on the run's seed and on ``name`` alone."""
        return int.from_bytes(hashlib.sha256(f"{self.seed} {name}".encode()).digest()[:4])

    def is_greedy(self, prompt_id: str) -> bool:
        """Whether a prompt is answered greedily; else its answer is sampled."""
        return self.seed_for(prompt_id) < self.greedy_share * 2**32


def require_positive(config: Any, section: str, names: Sequence[str]) -> None:
    """Raise ``ValueError`` for the first of these settings that is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise ValueError(f"{section}.{name} must be at least 1, got {getattr(config, name)}")


def dataset_fingerprint(folder: Path) -> str:
    """What ``datasets`` calls the contents of a saved data set; where it says nothing, the path."""
    state = folder / "state.json"
    known = json.loads(state.read_text()).get("_fingerprint") if state.is_file() else None
    return known or str(folder)
