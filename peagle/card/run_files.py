"""What a run recorded about itself, read from its files and from nowhere else.

    provenance.json            written by the training code; schema = the dataclasses below
    metrics/validate.json      teacher-forced accuracy per depth
    metrics/acceptance.json    real speculative decoding: acceptance length per prompt set and K
    metrics/bench.json         the drafter in an engine: tokens per second and latency
    metrics/train.csv          Lightning's CSVLogger; `val/accuracy_d0`.. in sparse cells
    drafter/                   config.json and model.safetensors, as served

Every file and every field may be absent. What is absent stays None: nothing is filled in here.
"""

import csv
import hashlib
import json
import math
import re
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

EMBEDDED = "tiny"  # as in peagle.target.target, which would load transformers to say so

Row = dict[str, Any]
Section = TypeVar("Section")


@dataclass(frozen=True)
class Target:
    """provenance.json "target".

    ``name_or_path`` is a Hub id ``owner/name``, "tiny" for the target that ships with peagle, or
    a folder, written so that it cannot be read as a Hub id (absolute, or starting with ".").
    """

    name_or_path: str | None = None
    revision: str | None = None
    architecture: str | None = None
    license: str | None = None
    fingerprint: str | None = None

    @property
    def hub_id(self) -> str | None:
        return self.name_or_path if is_hub_id(self.name_or_path) else None

    @property
    def embedded(self) -> bool:
        return self.name_or_path is not None and (
            self.name_or_path == EMBEDDED or Path(self.name_or_path).name == "tiny_target"
        )


@dataclass(frozen=True)
class Training:
    """provenance.json "training". ``rows`` and ``tokens`` are totals over all steps."""

    num_depths: int | None = None
    keep_ratio: float | None = None
    min_keep_ratio: float | None = None
    loss: str | None = None
    optimizer: str | None = None
    lr: float | None = None
    steps: int | None = None
    tokens: int | None = None
    rows: int | None = None
    hours: float | None = None
    seed: int | None = None
    precision: str | None = None
    max_tokens: int | None = None
    accumulate_grad_batches: int | None = None


@dataclass(frozen=True)
class Data:
    """provenance.json "data": the store and how its answers were made.

    ``prompts`` is a count or the name of a source; ``datasets`` are Hub ids where they have one;
    ``regenerated`` false: the answers are the data's own, not made by the target for this run.
    """

    prompts: int | str | None = None
    samples: int | None = None
    tokens: int | None = None
    supervised_tokens: int | None = None
    regenerated: bool | None = None
    greedy_share: float | None = None
    temperature: float | None = None
    max_new_tokens: int | None = None
    manifest_sha256: str | None = None
    datasets: list[str] | None = None


@dataclass(frozen=True)
class Environment:
    """provenance.json "environment". ``gpu`` null means a run without one; absent means unknown."""

    peagle: str | None = None
    python: str | None = None
    torch: str | None = None
    lightning: str | None = None
    transformers: str | None = None
    platform: str | None = None
    cpu: str | None = None
    cores: int | None = None
    gpu: str | None = None
    git_commit: str | None = None
    command: str | None = None
    date: str | None = None


@dataclass(frozen=True)
class Drafter:
    """The servable folder: its weights and the fields of config.json that a reader asks for."""

    num_depths: int | None = None
    num_hidden_layers: int | None = None
    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    vocab_size: int | None = None
    draft_vocab_size: int | None = None
    target_hidden_size: int | None = None
    eagle_aux_hidden_state_layer_ids: list[int] | None = None
    norm_before_residual: bool | None = None
    norm_before_fc: bool | None = None
    fc_norm: bool | None = None
    parallel_drafting: bool | None = None
    mask_token_id: int | None = None
    max_position_embeddings: int | None = None
    torch_dtype: str | None = None
    parameters: int | None = None
    weights_sha256: str | None = None
    folder: str | None = None


@dataclass(frozen=True)
class Measured:
    """One metrics file: its rows, what stands beside them, and the machine it was measured on.

    The file's "provenance" holds the fields of Environment beside the target and the step. It is
    shown with the numbers, because a bench often runs on another machine than the training.
    """

    rows: tuple[Row, ...] = ()
    totals: Row = field(default_factory=dict)
    environment: Environment = Environment()


@dataclass(frozen=True)
class Facts:
    """Everything a card may say."""

    run_id: str | None
    target: Target
    training: Training
    data: Data
    environment: Environment
    drafter: Drafter
    validate: Measured
    acceptance: Measured
    bench: Measured
    accuracy_curve: dict[int, list[tuple[int, float]]]
    """Depth -> (step, accuracy) pairs in the order of train.csv."""

    @property
    def num_depths(self) -> int | None:
        return self.training.num_depths or self.drafter.num_depths

    @property
    def kind(self) -> str:
        """What the drafter is called; a folder that does not say so is of the time before EAGLE-3
        was trained here."""
        return "EAGLE-3" if self.drafter.parallel_drafting is False else "P-EAGLE"

    @classmethod
    def read(cls, run_dir: Path, drafter_dir: Path) -> "Facts":
        provenance = _document(run_dir / "provenance.json")
        metrics = run_dir / "metrics"
        return cls(
            run_id=provenance.get("run_id"),
            target=_section(Target, provenance.get("target")),
            training=_section(Training, provenance.get("training")),
            data=_section(Data, provenance.get("data")),
            environment=_environment(provenance.get("environment")),
            drafter=_drafter(drafter_dir),
            validate=_measured(metrics / "validate.json"),
            acceptance=_own_rows(_measured(metrics / "acceptance.json")),
            bench=_measured(metrics / "bench.json"),
            accuracy_curve=_accuracy_curve(metrics / "train.csv"),
        )


def is_hub_id(name: str | None) -> bool:
    """``owner/name`` in the Hub's own grammar; a bare name may be a folder and does not count."""
    if name is None or "/" not in name or not name.isascii():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def number(value: Any) -> float | None:
    """``value`` as a finite float, None for everything that is not a measurement."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _document(path: Path) -> Row:
    if not path.exists():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        message = f"{path} is not valid JSON ({error}): run the command that wrote it again"
        raise ValueError(message) from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object: run the command that wrote it again")
    return document


def _section(kind: type[Section], values: Row | None) -> Section:
    values = values or {}
    return kind(**{f.name: values[f.name] for f in fields(kind) if values.get(f.name) is not None})


def _environment(values: Row | None) -> Environment:
    values = dict(values or {})
    if "gpu" in values and values["gpu"] is None:
        values["gpu"] = "none"  # the schema's way to say that the run had no GPU
    return _section(Environment, values)


def _measured(path: Path) -> Measured:
    document = _document(path)
    totals = {key: value for key, value in document.items() if key not in ("rows", "provenance")}
    environment = _environment(document.get("provenance"))
    return Measured(tuple(document.get("rows") or ()), totals, environment)


def _own_rows(measured: Measured) -> Measured:
    """Without the rows of a baseline: the run's own drafter stands first."""
    if not measured.rows:
        return measured
    own = measured.rows[0].get("method")
    return replace(measured, rows=tuple(r for r in measured.rows if r.get("method") == own))


def _drafter(folder: Path) -> Drafter:
    config = _document(folder / "config.json")
    config["torch_dtype"] = config.get("torch_dtype") or config.get("dtype")  # transformers 4, 5
    weights = folder / "model.safetensors"
    if weights.exists():
        with weights.open("rb") as file:
            config["weights_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        with safe_open(weights, framework="numpy") as tensors:
            shapes = [
                tensors.get_slice(name).get_shape()
                for name in tensors.keys()
                if name not in ("d2t", "t2d")  # vocabulary maps, not parameters
            ]
        config["parameters"] = sum(math.prod(shape) for shape in shapes)
    return _section(Drafter, {**config, "folder": folder.resolve().name})


def _accuracy_curve(path: Path) -> dict[int, list[tuple[int, float]]]:
    curve: dict[int, list[tuple[int, float]]] = {}
    if not path.exists():
        return curve
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for column, cell in line.items():
                depth = re.fullmatch(r"val/accuracy_d(\d+)", column or "")
                if depth and cell and line.get("step"):
                    point = (int(float(line["step"])), float(cell))
                    curve.setdefault(int(depth[1]), []).append(point)
    return dict(sorted(curve.items()))
