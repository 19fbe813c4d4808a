"""The drafter's card: README.md and plots, a pure function of the files of a run.

    files of the run -> RunFiles -> model_cards/card.md.jinja with tables.py -> README.md
                                 -> plots.py -> *.png

    python -m peagle.card.card RUN_DIR DRAFTER_DIR OUT [--options.repo_id OWNER/NAME]

The command also copies the files that the figures come from, so that the page can be checked.

A number stands on the card only if it stands in a file; a fact without a value reads
"not recorded", a measurement without one "not measured".
"""

import json
import re
import shlex
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path, PurePath
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from jsonargparse import auto_cli

from peagle.card import markdown, tables
from peagle.card.plots import PLOTS, draw_plots, measured_plots
from peagle.card.run_files import RunFiles, Section, is_hub_id
from peagle.card.served_depth import served_depth
from peagle.store.disk import write_atomically

# All that the Hub knows. An adapter is what a drafter comes closest to: a small part that runs
# beside an unchanged base model and is of no use without it.
RELATIONS = ("adapter", "merge", "quantized", "finetune")
TAGS = {
    "P-EAGLE": ("speculative-decoding", "eagle3", "p-eagle", "parallel-drafting", "vllm"),
    "EAGLE-3": ("speculative-decoding", "eagle3", "vllm"),
}
PAPERS = {"P-EAGLE": "2602.01469", "EAGLE-3": "2503.01840"}
SOURCES = ("provenance.json", "metrics/validate.json", "metrics/acceptance.json",
           "metrics/bench.json", "metrics/train.csv")  # fmt: skip
# The Hub refuses a card whose licence it does not know. These are the ones that targets carry;
# any other goes out as "other" with its name beside it, which is always valid.
LICENSES = frozenset(
    "apache-2.0 mit bsd-2-clause bsd-3-clause cc0-1.0 cc-by-4.0 cc-by-sa-4.0 cc-by-nc-4.0 gemma "
    "llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 openrail bigscience-openrail-m".split()
)


@dataclass(frozen=True)
class CardOptions:
    """What the files of a run cannot know.

    ``license`` overrides the target's. ``repo_id`` is where the drafter will be published: the
    serving lines name it, and without one they name the folder. ``base_model`` is the Hub id of a
    target that was given as a folder.
    """

    base_model_relation: str = "adapter"
    license: str | None = None
    repo_id: str | None = None
    base_model: str | None = None

    def __post_init__(self):
        if self.base_model_relation not in RELATIONS:
            raise ValueError(
                f"base_model_relation must be one of {', '.join(RELATIONS)}, "
                f"got {self.base_model_relation!r}"
            )
        for name in ("repo_id", "base_model"):
            if (value := getattr(self, name)) is not None and not is_hub_id(value):
                raise ValueError(f"{name} must read owner/name, got {value!r}")


def write_card(
    run_dir: Path, drafter_dir: Path, out: Path, *, options: CardOptions | None = None
) -> None:
    """Write ``out/README.md`` and the plots that the run's metrics allow.

    Every file appears whole or not at all, the README after the plots it shows; a plot of an
    earlier card that this one does not show is removed.

    Raises:
        ValueError: if a file of the run is not valid JSON.
    """
    run = RunFiles.read(Path(run_dir), Path(drafter_dir))
    readme = render(run, options)
    plots = draw_plots(run)
    for name, png in plots.items():
        write_atomically(out / name, png)
    write_atomically(out / "README.md", readme.encode())
    for name in set(PLOTS) - set(plots):
        (out / name).unlink(missing_ok=True)


def write_page(
    run_dir: Path, drafter_dir: Path, out: Path, *, options: CardOptions | None = None
) -> None:
    """Write the card, and beside it the files that its figures come from.

    Raises:
        ValueError: if there is no run, or ``out`` has a README that is no earlier card.
    """
    if not (run_dir / "provenance.json").is_file():
        raise ValueError(f"{run_dir} holds no run: train it first")
    readme = out / "README.md"
    if readme.exists() and "library_name: peagle" not in readme.read_text("utf-8", "replace"):
        raise ValueError(f"{readme} is no card of peagle: give a folder of its own for the card")
    write_card(run_dir, drafter_dir, out, options=options)
    sources = {name: run_dir / name for name in SOURCES}
    sources["config.json"] = drafter_dir / "config.json"
    for name, source in sources.items():
        if source.is_file():
            write_atomically(out / name, source.read_bytes())
        else:
            (out / name).unlink(missing_ok=True)


def render(run: RunFiles, options: CardOptions | None = None) -> str:
    """The whole README.md, front matter included; the Hub client reads it back unchanged."""
    options = options or CardOptions()
    if options.base_model:
        target = Section(run.target, hub_id=options.base_model, hub_id_from=None)
        run = replace(run, target=target)
    body = _template().render(
        run=run,
        options=options,
        tables=tables,
        target=target_name(run),
        license=_license(run, options),
        location=drafter_location(run, options),
        speculative_config=speculative_config(run, options),
        served=served_depth(run),
        plots=measured_plots(run),
        paper=PAPERS[run.method],
    )
    card = f"---\n{front_matter(run, options).to_yaml()}\n---\n\n{body}"
    assert ModelCard(card).content == card, "the card's front matter does not survive the client"
    return card


def front_matter(run: RunFiles, options: CardOptions) -> ModelCardData:
    """The metadata that the Hub indexes; a target that is not on the Hub is not named in it."""
    base = run.target_hub_id
    datasets = [name for name in dict.fromkeys(run.data["datasets"] or ()) if is_hub_id(name)]
    results = _eval_results(run)
    return ModelCardData(
        base_model=base,
        base_model_relation=options.base_model_relation if base else None,
        datasets=datasets or None,
        library_name="peagle",
        pipeline_tag="text-generation",
        tags=[*TAGS[run.method], f"arxiv:{PAPERS[run.method]}"],
        model_name=f"{run.method} drafter for {target_name(run)}" if results else None,
        eval_results=results or None,
        **_license_fields(_license(run, options)),
    )


def target_name(run: RunFiles) -> str:
    """How the page calls the target: its Hub id, or the last part of its folder."""
    name = run.target["name_or_path"]
    if name is None:
        return "a target that was not recorded"
    if run.target_is_embedded:
        return "the embedded target"
    return markdown.one_line(run.target_hub_id or PurePath(name).name)


def drafter_location(run: RunFiles, options: CardOptions) -> str:
    return options.repo_id or f"./{markdown.one_line(run.drafter['folder'])}"


def speculative_config(run: RunFiles, options: CardOptions) -> dict[str, Any] | None:
    """vLLM's setting, None while the number of depths or the target is unknown.

    The method has to be named: vLLM finds it by itself only in a path that contains "eagle3".
    Nothing in the drafter's own config.json turns parallel drafting on.
    """
    served = served_depth(run)
    if served is None or run.target["name_or_path"] is None:
        return None
    config = {
        "method": "eagle3",
        "model": drafter_location(run, options),
        "num_speculative_tokens": served.k,
    }
    return config | ({"parallel_drafting": True} if run.method == "P-EAGLE" else {})


def _license(run: RunFiles, options: CardOptions) -> str | None:
    name = options.license or run.target["license"]
    return markdown.one_line(name) if name else None


def _license_fields(name: str | None) -> dict[str, str]:
    if name is None:
        return {}
    known = name.lower()
    if known in LICENSES:
        return {"license": known}
    return {"license": "other", "license_name": _slug(name)}


def _eval_results(run: RunFiles) -> list[EvalResult]:
    """Measured acceptance lengths only: a teacher-forced figure must not pass for one."""
    results = []
    for row in run.acceptance.rows:
        if markdown.as_number(row.get("acceptance_length")) is None:
            continue
        prompt_set = markdown.one_line(row.get("prompt_set"))
        conditions = [
            f"K = {row.get('k')}",
            f"temperature {markdown.as_text(markdown.as_number(row.get('temperature')))}",
        ]
        conditions += [markdown.one_line(row[key]) for key in ("engine", "dtype") if row.get(key)]
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type=_slug(prompt_set),
                dataset_name=prompt_set,
                metric_type="acceptance_length",
                metric_name=f"acceptance length ({', '.join(conditions)})",
                metric_value=row["acceptance_length"],
            )
        )
    return results


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-.") or "unnamed"


@cache
def _template() -> Template:
    environment = Environment(
        # importlib.resources cannot open a namespace package that is installed in editable mode
        loader=PackageLoader("peagle.model_cards", ""),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        text=markdown.as_text,
        code=markdown.as_code,
        measured=markdown.as_measurement,
        without_folders=markdown.without_folders,
        json=partial(json.dumps, indent=2, ensure_ascii=False),
        quote=shlex.quote,
        repr=repr,
    )
    return environment.get_template("card.md.jinja")


if __name__ == "__main__":
    try:
        auto_cli(write_page)
    except ValueError as error:
        raise SystemExit(f"card: {error}") from None
