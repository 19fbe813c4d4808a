"""Rules about the source itself: who imports whom, and what must not occur."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted([*ROOT.glob("peagle/**/*.py"), *ROOT.glob("callbacks/**/*.py")])
LEVELS = [
    {"address", "model.onednn", "model.fused", "loss_kernel"},
    {"model.weight"},
    {"model.held"},
    {"provenance", "optimizer", "optimizer_options", "guard", "checkpoint", "data.order",
     "cod.rollouts", "model.config", "model.products", "data.chat", "data.prompts",
     "data.read_ahead", "data.shard", "data.disk", "data.buffers", "data.sample", "data.locks",
     "data.damage", "engine.server", "engine.post"},
    {"data.manifest"},
    {"data.index"},
    {"data.store", "data.store_writer", "loss", "cod.rounds", "engine.vllm",
     "model.feed_forward"},
    {"cod.segments", "cod.visibility", "data.bad_samples", "data.vocab", "data.capture_config",
     "data.parts", "restore", "metrics", "model.layers", "model.row_states", "model.memory",
     "model.slot_cache", "model.target_head", "model.target_layers", "model.unmasked"},
    {"model.attention_plan", "model.kernel", "model.dense"},
    {"model.seen"},
    {"model.flash", "model.flex", "data.shard_cache"},
    {"model.attention", "model.target", "data.batch", "data.fetch_ahead", "data.hub_files"},
    {"model.base", "model.windows", "data.talks", "data.states", "data.hub_store",
     "data.packed"},
    {"model.drafter", "model.eagle3", "data.answers", "data.converted"},
    {"model.kinds", "data.served"},
    {"saved_drafter", "model.drafting", "model.initial", "model.servable", "model.objective",
     "data.capture"},
    {"decoding", "model.export"},
    {"bench.client"},
    {"bench.report"},
    {"bench.plots"},
    {"evaluation", "plan.cost", "plan.forecast"},
    {"data.datamodule"},
    {"plan.report"},
    {"module"},
    {"bench.run"},
    {"cli"},
    {"__main__"},
]  # fmt: skip
LIGHTNING = {"module", "data.datamodule", "cli"}


def module_name(path):
    return ".".join(path.relative_to(ROOT / "peagle").with_suffix("").parts)


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


PEAGLE = [
    path
    for path in SOURCES
    if path.is_relative_to(ROOT / "peagle")
    and "tiny_target" not in path.parts
    and path.name != "__init__.py"
]


@pytest.mark.parametrize("path", PEAGLE, ids=module_name)
def test_a_module_imports_only_from_lower_levels(path):
    level = {name: number for number, names in enumerate(LEVELS) for name in names}
    ours = level[module_name(path)]
    for name in imports_of(path):
        assert not name.startswith("callbacks")
        if name.startswith("peagle."):
            assert level[name.removeprefix("peagle.")] < ours, name


@pytest.mark.parametrize("path", PEAGLE, ids=module_name)
def test_only_the_outer_modules_know_lightning(path):
    if module_name(path) not in LIGHTNING:
        assert not any(name.split(".")[0] == "lightning" for name in imports_of(path))


def test_only_the_publisher_talks_to_the_hub():
    writers = {"upload", "hub", "publish", "spool"}
    for path in SOURCES:
        if path.stem not in writers:
            assert not re.search(r"HfApi|create_commit|upload_f", path.read_text()), path


FORBIDDEN = {
    "pytorch_lightning": r"(from|import) pytorch_lightning",
    "pickle": r"^\s*(import|from) pickle",
    "unsafe load": r"torch\.load\((?![^)]*weights_only=True)",
    "remote code": r"trust_remote_code=True",
}


@pytest.mark.parametrize("rule", FORBIDDEN)
def test_what_must_not_occur_does_not(rule):
    assert len(SOURCES) > 25
    found = [p for p in SOURCES if re.search(FORBIDDEN[rule], p.read_text(), re.MULTILINE)]
    assert not found


def test_the_lightning_release_is_pinned_past_the_bad_ones():
    assert '"lightning>=2.6.6,<2.7"' in (ROOT / "pyproject.toml").read_text()
