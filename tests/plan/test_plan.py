"""What ``plan`` says against what a run then takes."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from paths import ROOT
from random_parts import make_drafter

from peagle.capture.capture import capture
from peagle.capture.config import CaptureConfig
from peagle.capture.identity import manifest_fields
from peagle.capture.prompts import PromptSource
from peagle.cod.sampling import Cod
from peagle.decode.evaluation import EvaluationConfig
from peagle.model.config import PEagleConfig
from peagle.plan.cost import Shape, cost_of
from peagle.plan.forecast import Forecast, Size, forecast
from peagle.plan.report import (
    RunShape,
    data_lines,
    mask_token,
    packs_of,
    sequence_of,
    steps_of,
    warnings,
)
from peagle.store.manifest import Manifest
from peagle.store.reader import Store
from peagle.target.target import TargetSource
from peagle.train.module import PEagleModule
from peagle.train.sampler import PackSampler

TARGET = TargetSource("tiny")
CAPTURE = CaptureConfig(
    prompts=[PromptSource("stdlib", limit=30)], max_new_tokens=24, dtype="float32", val_share=0.3
)
RUN = RunShape(
    drafter_config=PEagleModule(mask_token_id=3, cod=Cod(4), num_layers=2).drafter_config,
    cod=Cod(4, 0.5),
    max_tokens=1024,
    max_rows=600,
    memory_gb=None,
    recompute=False,
    devices=2,
    accumulate=4,
    epochs=3,
    max_steps=-1,
    half=True,
    muon=False,
    train_embeddings=True,
    device="cpu",
)
CONFIG = PEagleConfig(hidden_size=32, intermediate_size=64, num_attention_heads=4,
                      num_key_value_heads=2, num_hidden_layers=2, vocab_size=48)  # fmt: skip
SIZES = (Size(514, 100), Size(514, 300), Size(2000, 900)) * 10 + (Size(258, 20),) * 4
DATA = Forecast(
    600_000, 1_000_000, 400_000, 10**9, "written by hand", 0.0, frozenset({5, 6}), (), SIZES, True
)


def manifest_of(target, config):
    return Manifest(target.name, None, "", tokenizer="", answers="",
                    **manifest_fields(target.config(), config))  # fmt: skip


def test_the_disk_figure_is_what_the_store_then_takes(tmp_path):
    folder = tmp_path / "store"
    before = forecast(TARGET, CAPTURE, manifest_of(TARGET, CAPTURE), folder, answers=30)
    capture(TARGET, CAPTURE, folder)
    size = sum(path.stat().st_size for path in folder.iterdir())
    assert before.bytes == pytest.approx(size, rel=0.05)
    after = forecast(TARGET, CAPTURE, manifest_of(TARGET, CAPTURE), folder, answers=0)
    assert after.bytes == size and after.basis == "counted in the finished store"
    assert before.conversations == pytest.approx(after.conversations, rel=0.05)
    assert before.supervised == pytest.approx(after.supervised, rel=0.1)
    assert before.answer_seconds > 0 and 2 in before.ids


def test_the_time_of_transformers_is_not_given_for_answers_of_vllm(tmp_path):
    data = replace(DATA, answer_seconds=7200.0)

    def last_line(place=tmp_path / "store", **changes):
        return data_lines(data, place, replace(CAPTURE, **changes))[-1]

    assert last_line().startswith("answers    2.0 hours") and "second pass" in last_line()
    assert last_line(engine="vllm").startswith("answers    time not known: vLLM")
    (tmp_path / "manifest.json").touch()  # nothing is left to capture
    assert "vLLM" not in last_line(place=tmp_path, engine="vllm")


def test_answers_of_the_data_end_where_capture_ends_them(tmp_path, monkeypatch):
    said = "return 1\nreturn 2"
    talk = [{"role": "user", "content": "def f():"}, {"role": "assistant", "content": said}]
    (tmp_path / "talks.json").write_text(json.dumps([{"messages": talk}]))
    config = replace(
        CAPTURE, prompts=[PromptSource(str(tmp_path / "talks.json"))], regenerate=False
    )
    line_end = TARGET.tokenizer().encode("\n", add_special_tokens=False)
    monkeypatch.setattr(TargetSource, "end_tokens", lambda _: set(line_end))
    manifest = manifest_of(TARGET, config)
    found = forecast(TARGET, config, manifest, tmp_path / "store", answers=0)
    first = TARGET.tokenizer().encode("return 1\n", add_special_tokens=False)
    assert found.supervised == len(first)


def test_without_weights_every_answer_counts_as_long_as_allowed(tmp_path):
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((Path(TARGET.path) / name).read_bytes())
    target = TargetSource(str(tmp_path))
    found = forecast(target, CAPTURE, manifest_of(target, CAPTURE), tmp_path / "store", answers=9)
    assert found.supervised == 24 * found.conversations
    assert found.basis.startswith("upper bound") and found.answer_seconds == 0


def test_steps_and_rows_follow_from_the_packed_conversations():
    # Of 34 conversations 10 are too long; 20 fill 512 slots and 4 fill 256: some 11 to 13
    # sequences of 1,024, in steps of 2 x 4, three times.
    packs = packs_of(RUN, DATA)
    assert 11 <= len(packs) <= 13 and sum(map(sum, packs)) == 10 * 100 + 10 * 300 + 4 * 20
    assert steps_of(RUN, DATA) == 6
    assert steps_of(replace(RUN, max_steps=5), DATA) == 5
    # An answer of n tokens has n - 1 anchors, and n - 2 of them .5 + .25 + .125 deeper rows each;
    # the largest sequence has two of 300.
    shape = sequence_of(RUN, DATA, CONFIG)
    assert shape.rows == round((4080 - 24 + 0.875 * (4080 - 48)) / len(packs))
    assert max(map(sum, packs)) == 600 and shape.segment_rows == 1120 / 2
    assert sequence_of(RUN, replace(DATA, trained=()), CONFIG).rows == 1917
    guessed = packs_of(RUN, replace(DATA, exact=False))  # the long ones are perhaps not so long
    assert sum(map(sum, guessed)) == 4080 + 10 * 900 and len(guessed) >= len(packs) + 5
    budget = replace(RUN, max_rows=None, memory_gb=0.05)
    within = sequence_of(budget, DATA, CONFIG).segment_rows
    assert 0 < within <= 1120
    # Given both, both hold.
    both = [replace(budget, max_rows=rows) for rows in (10, 10**6)]
    assert [sequence_of(run, DATA, CONFIG).segment_rows for run in both] == [10, within]


def test_the_steps_are_those_that_fit_then_makes(tmp_path):
    folder = tmp_path / "store"
    capture(TARGET, CAPTURE, folder)
    known = forecast(TARGET, CAPTURE, manifest_of(TARGET, CAPTURE), folder, answers=0)
    run = replace(RUN, max_tokens=256, devices=1, accumulate=1, epochs=1)
    store = Store(folder)
    samples = store.split("train")
    lengths = [store.entries[i].tokens - 2 for i in samples]
    sampler = PackSampler(
        samples, lengths, max_tokens=256, seed=0, rank=0, world_size=1, done=lambda: 0
    )
    assert steps_of(run, known) == len(sampler) > 3


def test_memory_by_part_counts_every_parameter():
    drafter = make_drafter()
    count = sum(p.numel() for p in drafter.parameters())
    shape = Shape(100, 200, 100)

    def parts(**changes):
        settings = {"half": False, "muon": False, "train_embeddings": True, **changes}
        return cost_of(drafter.config, shape, **settings).memory

    assert parts()["weights"] == 4 * count and parts()["optimizer"] == 8 * count
    assert parts(muon=True)["optimizer"] < 0.8 * parts()["optimizer"]
    frozen = parts(train_embeddings=False)["gradients"]
    assert parts()["gradients"] - frozen == 8 * drafter.embed_tokens.weight.numel()
    assert 0.4 * parts()["segment"] < parts(half=True)["segment"] < 0.8 * parts()["segment"]
    shared = sum(p.numel() for p in drafter.shared_parameters() if p.ndim == 2)
    half, full = (parts(half=half)["bf16 copies"] for half in (True, False))
    assert 2 * shared < half < 4 * count and full == 0


@pytest.mark.parametrize(
    ("data", "run", "evaluation", "words"),
    [
        ({"conversations": 499_999}, {}, {}, "499,999 conversations are few: below 500,000"),
        ({"ids": frozenset({3})}, {}, {}, "the mask token 3 occurs in the data"),
        ({}, {}, {"k": (3, 5)}, "evaluation.k = 5 exceeds the trained depth 4"),
        ({}, {"max_tokens": 512}, {}, "data.max_tokens = 512 is smaller than capture.max_tokens"),
        ({"bytes": 10**18}, {}, {}, "the disk is too small: 1e+06 TB needed"),
        (
            {"unread": ("org/set: gone",)},
            {},
            {},
            "cannot be read here, counted by its limit only: org/set: gone",
        ),
        ({}, {}, {}, None),
    ],
)
def test_what_will_go_wrong_is_said_beforehand(tmp_path, data, run, evaluation, words):
    config = make_drafter(mask_token_id=3, num_depths=4).config
    found = warnings(
        replace(DATA, **data),
        config,
        replace(CAPTURE, max_tokens=1000),
        EvaluationConfig(**{"k": (3, 4), **evaluation}),
        replace(RUN, **run),
        tmp_path / "store",
    )
    assert len(found) == (words is not None)
    assert words is None or words in found[0]


def test_a_plan_of_eagle3_has_no_mask_token_and_fewer_weights_and_more_memory_per_row():
    shape = Shape(512, 3000, 3000)
    costs = [
        cost_of(
            make_drafter(parallel_drafting=parallel).config,
            shape,
            half=False,
            muon=False,
            train_embeddings=True,
        )
        for parallel in (True, False)
    ]
    assert costs[0].parameters - costs[1].parameters == 3 * 32  # the mask hidden state
    scores = 2 * 4 * 512 * 4  # layers, heads, slots, bytes
    assert costs[1].memory["segment"] - costs[0].memory["segment"] == 3000 * scores
    assert mask_token(TargetSource("tiny"), None).startswith("none")


def test_every_configuration_is_planned_from_its_targets_config_alone():
    """Offline: no weights, no tokenizer, no data set can be had."""
    shapes = {path.name for path in (ROOT / "tests/helpers/target_configs").iterdir()}
    names = sorted(shapes & {path.stem for path in ROOT.glob("configs/*.yaml")})
    script = (
        "import json, sys\n"
        "from peagle.cli import run\n"
        "for name in json.loads(sys.argv[1]):\n"
        "    print('##', name, flush=True)\n"
        "    run('plan', ['plan', '--config', f'configs/{name}.yaml', '--seconds', '0.01',\n"
        "                 '--trainer.precision', '32-true',\n"  # bf16 may be slow here
        "                 '--target', f'tests/helpers/target_configs/{name}'])\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, json.dumps(names)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    plans = dict(part.split("\n", 1) for part in result.stdout.split("## ")[1:])
    assert sorted(plans) == names and len(names) == 9
    for name, text in plans.items():
        for line in ("samples", "disk", "memory", "rows", "steps", "time", "warning"):
            assert f"\n{line} " in text, (name, line)
        assert "cannot be read here" in text and "warning    warning" not in text


def test_memory_of_a_shape_that_only_a_gpu_holds_is_computed_and_not_allocated():
    large = {"hidden_size": 8192, "num_attention_heads": 64, "head_dim": 128,
             "intermediate_size": 28672, "vocab_size": 200_000, "num_hidden_layers": 4}  # fmt: skip
    config = PEagleConfig(**large, eagle_aux_hidden_state_layer_ids=(2, 40, 77))
    cost = cost_of(config, Shape(8192, 30_000, 8192), half=True, muon=False, train_embeddings=True)
    assert sum(cost.memory.values()) > 100e9
