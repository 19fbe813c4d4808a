"""``python -m peagle plan``: what a run will cost, said before anything of it runs."""

import math
from pathlib import Path

from peagle.capture.config import CaptureConfig
from peagle.capture.identity import manifest_fields
from peagle.cod.sampling import Cod, expected_per_depth
from peagle.decode.evaluation import EvaluationConfig
from peagle.kernels.device import has_own_memory, peak_memory
from peagle.model.config import PEagleConfig
from peagle.plan.cost import Cost, Shape, cost_of, matrix_rate
from peagle.plan.forecast import Forecast, forecast, tokenizer_of
from peagle.plan.run_shape import RunShape
from peagle.store.disk import free_bytes
from peagle.store.hub import FoundStore
from peagle.store.manifest import Manifest
from peagle.target.target import TargetSource
from peagle.train.datamodule import DEFAULT_ROWS
from peagle.train.memory import rows_within
from peagle.train.sampler import fill_packs

ENOUGH = 500_000  # conversations; with fewer, drafters were reported to accept less


def plan(
    target: TargetSource,
    capture: CaptureConfig,
    evaluation: EvaluationConfig,
    run: RunShape,
    place: Path | FoundStore,
    *,
    answers: int = 128,
    seconds: float = 2.0,
) -> str:
    """The plan as text.

    Args:
        place: of the store: its folder, whether it is there yet or not, or on the Hub.
        answers: prompts that the target answers to learn how long answers are.
        seconds: how long this machine's speed is measured.
    """
    # What Python and its libraries take, in this process as in one that trains.
    program, text = peak_memory("cpu"), target.config()
    shape = manifest_fields(text, capture)
    manifest = Manifest(target.name, target.revision, "", tokenizer="", answers="", **shape)
    data = forecast(target, capture, manifest, place, answers=answers)
    config = run.drafter_config(manifest)
    sequence = sequence_of(run, data, config)
    cost = cost_of(
        config,
        sequence,
        half=run.half,
        muon=run.muon,
        train_embeddings=run.train_embeddings,
        recompute=run.recompute,
    )
    if not has_own_memory(run.device):
        cost.memory["program"] = program
    rate = matrix_rate(run.device, half=run.half, seconds=seconds)
    lines = [
        f"target     {target.name}: {text.model_type}, {shape['num_layers']} layers of width "
        f"{shape['hidden_size']}, vocabulary {shape['vocab_size']}; captured {shape['layer_ids']}",
        f"mask token {mask_token(target, config.mask_token_id)}",
        *data_lines(data, place, capture),
        *cost_lines(config, cost, sequence, run, data, rate),
        *warnings(data, config, capture, evaluation, run, place),
    ]
    return "\n".join(lines)


def sequence_of(run: RunShape, data: Forecast, config: PEagleConfig) -> Shape:
    """A full packed sequence: its slots, its rows after the draw, and those of the largest."""
    limit = run.max_rows or DEFAULT_ROWS
    if run.memory_gb is not None:
        within = rows_within(
            run.memory_gb,
            config,
            slots=run.max_tokens,
            rollout=run.cod.num_depths,
            mtp_share=run.cod.mtp_share(),
            element=2 if run.half else 4,
            recompute=run.recompute,
        )
        limit = min(run.max_rows or within, within)
    packs = packs_of(run, data) or [[float(run.max_tokens)]]  # unknown: the most
    drawn = [sum(expected_per_depth(reaching(answers, run.cod), run.cod)) for answers in packs]
    rows, most = max(1, round(sum(drawn) / len(drawn))), max(1, round(max(drawn)))
    return Shape(run.max_tokens, rows, math.ceil(most / math.ceil(most / limit)))


def reaching(answers: list[float], cod: Cod) -> list[int]:
    """Anchors that have a row of each depth, where every conversation has one answer.

    The first token of an answer follows no token of the assistant: no row guesses it.
    """
    return [round(sum(max(0.0, n - 1 - depth) for n in answers)) for depth in range(cod.num_depths)]


def packs_of(run: RunShape, data: Forecast) -> list[list[float]]:
    """Supervised positions of each conversation of each packed sequence of an epoch, packed as
    training packs them.

    Training leaves out conversations that are too long; where sizes are estimates, none is.
    """
    most = run.max_tokens + 2
    fitting = [size for size in data.trained if 3 <= size.tokens <= most or not data.exact]
    packs = fill_packs(
        list(range(len(fitting))),
        [min(math.ceil(size.tokens), most) - 2 for size in fitting],
        max_tokens=run.max_tokens,
        seed=0,
    )
    return [[float(fitting[i].supervised) for i in members] for members in packs]


def mask_token(target: TargetSource, mask: int | None) -> str:
    """Which token of the target's vocabulary stands for a guess."""
    if mask is None:
        return "none: an eagle3 drafter reads its own guesses"
    tokenizer = tokenizer_of(target)
    if tokenizer is None:
        return f"{mask}; without the tokenizer its name is unknown"
    token = tokenizer.convert_ids_to_tokens(mask) if mask < len(tokenizer) else None
    return f"{mask}, {token!r}" if token else f"{mask}, a row that no token of the tokenizer uses"


def data_lines(data: Forecast, place: Path | FoundStore, capture: CaptureConfig) -> list[str]:
    lines = [
        f"samples    {data.conversations:,} conversations ({data.basis})",
        f"tokens     {data.tokens:,}, of which {data.supervised:,} are supervised",
        f"disk       {size(data.bytes)} in {place}",
    ]
    if capture.engine == "vllm" and capture.regenerate and not is_there(place):
        lines.append(
            "answers    time not known: vLLM writes them, and their hidden states in the same "
            "pass; `capture` shows its rate as it goes, and may be stopped and started again"
        )
    elif data.answer_seconds:
        lines.append(
            f"answers    {duration(data.answer_seconds)} for the target to write here; a second "
            "pass that reads their hidden states comes on top"
        )
    return lines


def is_there(place: Path | FoundStore) -> bool:
    """Whether nothing has to be captured any more."""
    return isinstance(place, FoundStore) or (place / "manifest.json").exists()


def cost_lines(
    config: PEagleConfig, cost: Cost, sequence: Shape, run: RunShape, data: Forecast, rate: float
) -> list[str]:
    total = sum(cost.memory.values())
    uses = ", ".join(f"{name} {size(count)}" for name, count in cost.memory.items())
    steps, rows = steps_of(run, data), sequence.rows * run.accumulate * run.devices
    work = cost.flops * run.accumulate * steps
    return [
        f"drafter    {config.num_hidden_layers} layers of width {config.hidden_size}, "
        f"{cost.parameters / 1e6:,.1f} M parameters, K {config.num_depths}",
        f"memory     {size(total)} per device for training: {uses}",
        f"rows       {rows:,} per step, {sequence.segment_rows:,} in the largest segment",
        f"steps      {steps:,}",
        f"time       at least {duration(work / rate)} of training here: {work:.2g} operations per "
        f"device at the {rate / 1e9:,.0f} billion per second that matrix products reach on this "
        f"{run.device}; attention and small operations come on top",
    ]


def steps_of(run: RunShape, data: Forecast) -> int:
    """Raises ``ValueError`` for a run without an end."""
    if run.epochs < 0 and run.max_steps < 0:
        raise ValueError("training needs an end: set trainer.max_epochs or trainer.max_steps")
    if run.epochs < 0:
        return run.max_steps
    sequences = len(packs_of(run, data))
    steps = math.ceil(sequences / (run.devices * run.accumulate)) * run.epochs
    return min(steps, run.max_steps) if run.max_steps > 0 else steps


def warnings(
    data: Forecast,
    config: PEagleConfig,
    capture: CaptureConfig,
    evaluation: EvaluationConfig,
    run: RunShape,
    place: Path | FoundStore,
) -> list[str]:
    """What will go wrong, or less well than hoped."""
    problems = [f"cannot be read here, counted by its limit only: {text}" for text in data.unread]
    if data.conversations < ENOUGH:
        problems.append(
            f"{data.conversations:,} conversations are few: below {ENOUGH:,} acceptance suffers"
        )
    if config.mask_token_id in data.ids:
        problems.append(
            f"the mask token {config.mask_token_id} occurs in the data: fit will refuse those "
            "samples; choose a token id that never occurs"
        )
    beyond = [k for k in evaluation.k if k > config.num_depths]
    if beyond:
        problems.append(
            f"evaluation.k = {max(beyond)} exceeds the trained depth {config.num_depths}: guesses "
            "beyond it are untrained"
        )
    if run.max_tokens < capture.max_tokens:
        problems.append(
            f"data.max_tokens = {run.max_tokens} is smaller than capture.max_tokens = "
            f"{capture.max_tokens}: longer conversations are captured, but not trained"
        )
    if not is_there(place):
        free = free_bytes(place)
        if data.bytes > free:
            problems.append(f"the disk is too small: {size(data.bytes)} needed, {size(free)} free")
    return [f"warning    {problem}" for problem in problems]


def size(count: int | float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} TB"


def duration(seconds: int | float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
