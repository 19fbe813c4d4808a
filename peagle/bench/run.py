"""``python -m peagle bench``: the drafter in vLLM, at each K and concurrency, beside no drafter."""

import json
import os
import shlex
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import NamedTuple

from peagle.bench.client import Question, closed_loop, read_counters
from peagle.bench.plots import draw
from peagle.bench.report import (
    Conditions,
    Measurement,
    NamedDrafter,
    Row,
    bench_rows,
    format_bench,
    format_best,
)
from peagle.capture.config import require_positive
from peagle.capture.prompts import Prompt, PromptSource, check_sources, load_prompts
from peagle.card.provenance import environment
from peagle.card.run_files import sha256
from peagle.decode.evaluation import turn_prompt
from peagle.kernels.device import cpu_name
from peagle.model.config import PEagleConfig
from peagle.model.restore import refuse_other_target
from peagle.next_step import publish_command
from peagle.serve.contract import check_folder
from peagle.serve.vllm import (
    Serving,
    Vllm,
    absolute,
    find_vllm,
    require_exact_sampling,
    require_parallel_drafting,
    serve,
)
from peagle.store.disk import require_writable, write_atomically
from peagle.target.target import TargetSource


@dataclass(frozen=True)
class BenchConfig:
    """What ``bench`` measures.

    Args:
        drafter: folder that ``fit`` or ``export`` wrote.
        baseline: folder of another drafter for this target, such as an EAGLE-3 one, to be served at
            the same K and shown beside.
        target: ``tiny`` (embedded), a folder, or a Hub id.
        revision: of the Hub id.
        vllm_python: interpreter of the environment that has vLLM; default the running one.
        prompts: prompt sets, as in ``test``; each gets its own rows.
        k: drafts per round to try.
        concurrency: requests kept in flight.
        max_new_tokens: length limit of an answer.
        temperature: 0 is greedy; then outputs with and without drafter are compared.
        dtype: precision of target and drafter in the engine.
        run_dir: ``metrics/bench.json`` and two plots go here; default the drafter's parent folder.
        max_model_len: longest context of the engine; default the target's.
        enforce_eager: without compilation and CUDA graphs; default only on a CPU.
        start_timeout_s: how long the engine may take to come up.
        vllm_args: further arguments of the server, such as ``[--tensor-parallel-size, "2"]``.
    """

    drafter: Path
    target: str
    baseline: Path | None = None
    revision: str | None = None
    vllm_python: str | None = None
    prompts: list[PromptSource] = field(
        default_factory=lambda: [PromptSource("stdlib", "test", limit=40)]
    )
    k: tuple[int, ...] = (3, 5, 7)
    concurrency: tuple[int, ...] = (1, 4)
    max_new_tokens: int = 256
    temperature: float = 0.0
    dtype: str = "bfloat16"
    run_dir: Path | None = None
    max_model_len: int | None = None
    enforce_eager: bool | None = None
    start_timeout_s: float = 900.0
    vllm_args: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_sources(self.prompts, "bench")
        require_positive(self, "bench", ("max_new_tokens",))
        for name in ("k", "concurrency"):
            numbers = getattr(self, name)
            if not numbers or min(numbers) < 1 or len(set(numbers)) < len(numbers):
                raise ValueError(f"{name} must list different numbers from 1 up, got {numbers}")
        if self.temperature < 0:
            raise ValueError(f"temperature must not be negative, got {self.temperature}")


class PromptSet(NamedTuple):
    """Prompts of one set, rendered by the target's chat template."""

    name: str
    ids: list[list[int]]  # of first turns; of all turns once the target has answered
    prompts: list[Prompt]


def bench(config: BenchConfig) -> None:
    """Measure, print the table, write ``bench.json`` and the plots.

    Everything that can be known to be wrong is refused before an engine starts. The file is
    written anew after each engine, so that a failure at the last K does not lose the others.
    """
    end_by_signals()
    target = TargetSource(config.target, config.revision)
    text = target.config()
    folders = [folder for folder in (config.drafter, config.baseline) if folder is not None]
    drafters = {folder: check_folder(folder) for folder in folders}
    for drafter in drafters.values():
        refuse_other_target(drafter, text)
        warn_beyond_training(drafter, config.k)
    folder = (config.run_dir or config.drafter.resolve().parent) / "metrics"
    require_writable(folder)
    vllm = find_vllm(config.vllm_python)
    architectures = {name for drafter in drafters.values() for name in drafter.architectures}
    require_parallel_drafting(vllm, [*sorted(architectures), *(text.architectures or ())])
    require_exact_sampling(vllm, config.temperature)
    prompt_sets = rendered_prompts(config, target)

    conditions = Conditions(vllm.name, hardware(vllm), config.dtype, config.temperature)
    engine = f"{vllm.name} on {conditions.hardware}"
    print(f"{engine}; {config.dtype}, temperature {config.temperature:g}", file=sys.stderr)
    measurements: list[Measurement] = []
    for drafter, k in [(None, 0), *product(named(drafters), config.k)]:
        measurements += measure(config, target, vllm, prompt_sets, drafter, k)
        rows = bench_rows(measurements, conditions)
        write_results(folder / "bench.json", config, vllm, rows)
    print(f"\n{engine}\n{config.dtype}, temperature {config.temperature:g}, at most "
          f"{config.max_new_tokens} new tokens")  # fmt: skip
    print(format_bench(rows))
    print(format_best(rows))
    for path in (folder / "bench.json", *draw(rows, folder)):
        print(f"wrote {path}")
    if (folder.parent / "provenance.json").exists():
        run_dir = str(folder.parent)
        words = shlex.join([run_dir, str(config.drafter), f"{run_dir}/card"])
        print(f"for the card: python -m peagle.card.card {words} --options.repo_id OWNER/NAME")
    if (folder.parent / "card" / "README.md").exists():
        print(f"next:\n{publish_command(folder.parent)}")


def named(drafters: dict[Path, PEagleConfig]) -> list[NamedDrafter]:
    """The second of two drafters of one kind is called the baseline."""
    (ours, config), *others = drafters.items()
    names = [NamedDrafter(str(ours), config.method)]
    for folder, baseline in others:
        suffix = " (baseline)" if baseline.method == config.method else ""
        names.append(NamedDrafter(str(folder), baseline.method + suffix))
    return names


def end_by_signals() -> None:
    """SIGTERM and a closed terminal end the command like an error, so that the engine ends too."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup asks
            signal.signal(number, lambda received, _: sys.exit(128 + received))


def warn_beyond_training(drafter: PEagleConfig, k: tuple[int, ...]) -> None:
    untrained = ", ".join(str(number) for number in k if number > drafter.num_depths)
    if untrained:
        print(f"warning: the drafter was trained for K up to {drafter.num_depths}; its further "
              f"guesses at K = {untrained} are untrained", file=sys.stderr)  # fmt: skip


def hardware(vllm: Vllm) -> str:
    processor = f"{cpu_name()}, {os.cpu_count()} cores"
    return processor if vllm.device == "cpu" else f"{vllm.device_name}; {processor}"


def rendered_prompts(config: BenchConfig, target: TargetSource) -> list[PromptSet]:
    tokenizer = target.tokenizer()
    return [
        PromptSet(source.name, [turn_prompt(tokenizer, p, [], None) for p in prompts], prompts)
        for source, prompts in ((source, load_prompts(source)) for source in config.prompts)
    ]


def add_later_turns(
    port: int, config: BenchConfig, target: TargetSource, prompt_set: PromptSet
) -> None:
    """Later turns become requests too, in the context of what this engine answers greedily."""
    prompts, latest, tokenizer = prompt_set.prompts, list(prompt_set.ids), target.tokenizer()
    history: list[list[list[int]]] = [[] for _ in prompts]
    while remaining := [i for i, p in enumerate(prompts) if len(p.turns) > len(history[i]) + 1]:
        questions = [Question(latest[i], config.max_new_tokens, 0.0) for i in remaining]
        answers = closed_loop(port, questions, max(config.concurrency)).answers
        for i, answer in zip(remaining, answers, strict=True):
            history[i].append(answer.tokens)
            latest[i] = turn_prompt(tokenizer, prompts[i], history[i], None)
            prompt_set.ids.append(latest[i])


def measure(
    config: BenchConfig,
    target: TargetSource,
    vllm: Vllm,
    prompt_sets: list[PromptSet],
    drafter: NamedDrafter | None,
    k: int,
) -> Iterator[Measurement]:
    """Start one engine and ask it every prompt set at every concurrency."""
    eager = vllm.device == "cpu" if config.enforce_eager is None else config.enforce_eager
    serving = Serving(
        target=absolute(target.path),
        revision=target.revision,
        drafter=str(Path(drafter.folder).resolve()) if drafter else None,
        parallel=drafter is not None and drafter.method.startswith("p-eagle"),
        k=k,
        dtype=config.dtype,
        max_model_len=config.max_model_len,
        enforce_eager=eager,
        prefix_caching=False,  # the same prompts are asked again, and each must pay for its prefill
        arguments=tuple(config.vllm_args),
    )
    name = f"{drafter.method}, K = {k}" if drafter else "no drafter"
    print(f"{name}: starting the engine", file=sys.stderr)
    with serve(vllm, serving, timeout_s=config.start_timeout_s) as server:
        for prompt_set in prompt_sets:
            if k == 0:  # the first engine, without drafter: all others are asked the same
                add_later_turns(server.port, config, target, prompt_set)
            for concurrency in config.concurrency:
                measured = ask_all(server.port, config, prompt_set, drafter, k, concurrency)
                print(f"{name}: {prompt_set.name}, {concurrency} at once: "
                      f"{measured.tokens_per_second:.1f} tok/s", file=sys.stderr)  # fmt: skip
                yield measured


def ask_all(
    port: int,
    config: BenchConfig,
    prompt_set: PromptSet,
    drafter: NamedDrafter | None,
    k: int,
    concurrency: int,
) -> Measurement:
    """Every prompt equally often, so often that the last round is a small part of the run."""
    questions = [Question(ids, config.max_new_tokens, config.temperature) for ids in prompt_set.ids]
    repeats = -(-2 * concurrency // len(questions))
    warm_up = [question._replace(max_new_tokens=16) for question in questions[: 2 * concurrency]]
    closed_loop(port, warm_up, concurrency)
    before = read_counters(port)
    what = f"{prompt_set.name}, {concurrency} at once"
    load = closed_loop(port, questions * max(repeats, 1), concurrency, what=what)
    counters = read_counters(port).since(before)
    if k and not counters.drafts:
        raise OSError("the engine counted no drafts: it served without the drafter")
    name, count = prompt_set.name, len(questions)
    return Measurement(name, drafter, k, concurrency, count, load.answers, load.seconds, counters)


def write_results(path: Path, config: BenchConfig, vllm: Vllm, rows: list[Row]) -> None:
    provenance = {
        "target": config.target,
        "revision": config.revision,
        "drafter": str(config.drafter),
        "weights_sha256": sha256(config.drafter / "model.safetensors"),
        "baseline": None if config.baseline is None else str(config.baseline),
        "vllm": vllm.version,
        "max_new_tokens": config.max_new_tokens,
        **environment(),
        # The engine's environment may see a GPU that this one's torch does not.
        "gpu": None if vllm.device == "cpu" else vllm.device_name,
    }
    content = json.dumps({"provenance": provenance, "rows": rows}, indent=2)
    write_atomically(path, content.encode())
