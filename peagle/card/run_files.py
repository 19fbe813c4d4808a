"""What a run recorded about itself, read from its files and from nowhere else.

    provenance.json            run_id, target, training, data, environment (callbacks/record.py)
    metrics/validate.json      teacher-forced accuracy per depth
    metrics/acceptance.json    real speculative decoding: acceptance length per prompt set and K
    metrics/bench.json         the drafter in an engine: tokens per second and latency
    metrics/train.csv          one line per logged step; `val/accuracy_d0`.. in sparse cells
    drafter/                   config.json and model.safetensors, as served

Every file and every field may be absent. What is absent stays absent: nothing is filled in here.
"""

import csv
import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import safe_open

EMBEDDED = "tiny"  # as in peagle.target.target, which would load transformers to say so

Value = TypeVar("Value")
Row = dict[str, Any]
Points = list[tuple[int, float]]  # optimizer step, value
Curve = dict[str, Points]  # by the name of the logged metric
CURVES = re.compile(r"(train|val)/(loss|accuracy_d\d+)")


class Section(dict[str, Any]):
    """A JSON object whose absent fields read as None."""

    def __missing__(self, key: str) -> None:
        return None


@dataclass(frozen=True)
class Metrics:
    """One metrics file: its rows, and the totals beside them.

    ``environment`` is the machine that the rows were measured on. It is shown with the numbers,
    because a bench often runs on another machine than the training.
    """

    rows: list[Row]
    totals: Section
    environment: Section


@dataclass(frozen=True)
class RunFiles:
    """Everything a card may say.

    ``target["name_or_path"]`` is a Hub id ``owner/name``, "tiny" for the target that ships with
    peagle, or a folder, written so that it cannot be read as a Hub id (absolute, or starting with
    "."). ``target["hub_id"]`` is the Hub id of a target in a folder, ``target["hub_id_from"]`` who
    says so. ``environment["gpu"]`` null means a run without one, absent means unknown.
    """

    run_id: str | None
    target: Section
    training: Section
    """``rows`` and ``tokens`` are totals over all steps."""
    data: Section
    """``prompts`` is a count or names of sources; ``datasets`` are Hub ids where they have one;
    ``regenerated`` false: the answers are the data's own, not made by the target for this run."""
    environment: Section
    drafter: Section
    """The fields of config.json; ``folder`` and, of the weights, ``parameters`` and
    ``weights_sha256``."""
    validate: Metrics
    acceptance: Metrics
    bench: Metrics
    curve: Curve
    """Losses and accuracies in the order of train.csv."""

    @property
    def num_depths(self) -> int | None:
        return self.training["num_depths"] or self.drafter["num_depths"]

    @property
    def method(self) -> str:
        """A drafter that does not name its method is from before EAGLE-3 was trained here."""
        return "EAGLE-3" if self.drafter["parallel_drafting"] is False else "P-EAGLE"

    @property
    def target_hub_id(self) -> str | None:
        name = self.target["hub_id"] or self.target["name_or_path"]
        return name if is_hub_id(name) else None

    @property
    def target_is_embedded(self) -> bool:
        name = self.target["name_or_path"]
        return name is not None and (name == EMBEDDED or Path(name).name == "tiny_target")

    @classmethod
    def read(cls, run_dir: Path, drafter_dir: Path) -> "RunFiles":
        """Raises ``ValueError`` for a file that is not valid JSON."""
        provenance = read_json(run_dir / "provenance.json")
        sections = ("target", "training", "data", "environment")
        drafter = _read_drafter(drafter_dir)
        validate, acceptance, bench = (
            _read_metrics(run_dir / "metrics" / name, drafter["weights_sha256"])
            for name in ("validate.json", "acceptance.json", "bench.json")
        )
        return cls(
            run_id=provenance.get("run_id"),
            **{name: Section(provenance.get(name) or {}) for name in sections},
            drafter=drafter,
            validate=validate,
            acceptance=replace(acceptance, rows=rows_of_first_method(acceptance.rows)),
            bench=bench,
            curve=read_curve(run_dir / "metrics/train.csv"),
        )


def accuracies(logged: Mapping[str, Value], part: str) -> dict[int, Value]:
    """Depth -> accuracy, or its curve, of ``part`` ("train" or "val"), ascending by depth."""
    start = f"{part}/accuracy_d"
    found = {int(n.removeprefix(start)): x for n, x in logged.items() if n.startswith(start)}
    return dict(sorted(found.items()))


def rows_of_first_method(rows: list[Row]) -> list[Row]:
    """The run's own drafter stands before those that it is compared with."""
    return [row for row in rows if row.get("method") == rows[0].get("method")]


def is_hub_id(name: str | None) -> bool:
    """``owner/name`` in the Hub's own grammar; a bare name may be a folder and does not count."""
    if name is None or "/" not in name or not name.isascii():
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def read_json(path: Path) -> Row:
    """The object in a JSON file, empty without the file.

    Raises:
        ValueError: if the file is torn or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        message = f"{path} is not valid JSON ({error}): run the command that wrote it again"
        raise ValueError(message) from error
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a JSON object: run the command that wrote it again")
    return document


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_metrics(path: Path, weights: str | None) -> Metrics:
    """Nothing, if the figures are of other weights: of an earlier fit, or of another checkpoint."""
    totals = Section(read_json(path))
    rows, environment = totals.pop("rows", None), Section(totals.pop("provenance", None) or {})
    if of_other_weights(environment, weights):
        return Metrics([], Section(), Section())
    return Metrics(list(rows or ()), totals, environment)


def of_other_weights(record: Mapping[str, Any], weights: str | None) -> bool:
    """Whether a metrics file's ``provenance`` names other weights; older ones name none."""
    return weights is not None and record.get("weights_sha256") not in (None, weights)


def _read_drafter(folder: Path) -> Section:
    config = Section(read_json(folder / "config.json"))
    config["torch_dtype"] = config["torch_dtype"] or config["dtype"]  # transformers 4, 5
    config["folder"] = folder.resolve().name
    weights = folder / "model.safetensors"
    if weights.exists():
        config["weights_sha256"] = sha256(weights)
        with safe_open(weights, framework="numpy") as tensors:
            shapes = [
                tensors.get_slice(name).get_shape()
                for name in tensors.keys()
                if name not in ("d2t", "t2d")  # vocabulary maps, not parameters
            ]
        config["parameters"] = sum(math.prod(shape) for shape in shapes)
    return config


def read_curve(path: Path) -> Curve:
    """The training curve in ``train.csv``, empty without the file."""
    curve: Curve = {}
    if not path.exists():
        return curve
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            for name, cell in line.items():
                if cell and line.get("step") and CURVES.fullmatch(name or ""):
                    point = (int(float(line["step"])), float(cell))
                    curve.setdefault(name, []).append(point)
    return curve
