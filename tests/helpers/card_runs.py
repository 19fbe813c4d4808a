"""Runs of which cards are written in tests, and how a test reads a card."""

import functools
import json
import re
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from peagle.card.card import render
from peagle.card.run_files import RunFiles

SHA = "9f2c" * 16

PROVENANCE = {
    "run_id": "run-7f3a",
    "target": {
        "name_or_path": "Qwen/Qwen3-8B",
        "revision": "b968826d9c46dd6066d109eabc6255188de91218",
        "architecture": "Qwen3ForCausalLM",
        "license": "apache-2.0",
        "fingerprint": "xxh3:5d1f",
    },
    "training": {
        "num_depths": 5, "keep_ratio": 0.8, "min_keep_ratio": 0.0, "loss": "kl",
        "optimizer": "AdamW", "lr": 0.0003, "steps": 1234, "tokens": 9876543, "rows": 34567890,
        "hours": 3.456, "seed": 17, "precision": "bf16-mixed", "max_tokens": 8192,
        "accumulate_grad_batches": 4,
    },
    "data": {
        "prompts": 1500, "samples": 1490, "tokens": 765432, "supervised_tokens": 543210,
        "greedy_share": 0.75, "temperature": 0.7, "max_new_tokens": 512,
        "manifest_sha256": SHA, "datasets": ["openai/openai_humaneval", "stdlib functions"],
    },
    "environment": {
        "peagle": "0.1.0", "python": "3.11.9", "torch": "2.13.0", "lightning": "2.6.6",
        "transformers": "5.23.0", "platform": "Linux x86_64", "cpu": "EPYC 9R14", "cores": 16,
        "gpu": "NVIDIA H200", "git_commit": "421ec65", "date": "2026-11-22",
        "command": "python -m peagle fit --config configs/qwen3.yaml --out /home/someone/runs/a",
    },
}  # fmt: skip

MEASURED_ON = {"target": "Qwen/Qwen3-8B", "step": 1234, **PROVENANCE["environment"]}

DRAFTER = {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 4,
    "hidden_size": 2048, "intermediate_size": 6144, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 151936, "draft_vocab_size": 32000,
    "target_hidden_size": 4096, "eagle_aux_hidden_state_layer_ids": [2, 18, 33],
    "norm_before_residual": False, "norm_before_fc": False, "fc_norm": True,
    "mask_token_id": 151669, "pard_token": 151669, "ptd_token_id": 151669,
    "max_position_embeddings": 40960, "torch_dtype": "bfloat16",
}  # fmt: skip

VALIDATE = {
    "provenance": MEASURED_ON,
    "teacher_forced_acceptance_length": 2.718281,
    "loss": 1.414213,
    "rows": [
        {"depth": d, "accuracy": a, "conditional_accuracy": c, "count": n}
        for d, a, c, n in [(0, 0.71234, 0.71234, 40321), (1, 0.5512, 0.6889, 39876),
                           (2, 0.4321, 0.6543, 39431), (3, 0.3456, 0.6123, 38986),
                           (4, 0.2876, 0.5987, 38541)]
    ],
}  # fmt: skip


def acceptance_row(prompt_set, k, length, temperature=0.0, **changes):
    return {
        "prompt_set": prompt_set, "k": k, "temperature": temperature, "engine": "vllm 0.32.0",
        "dtype": "bfloat16", "prompts": 80, "tokens": 20480 + k, "acceptance_length": length,
        "acceptance_length_ci95": [length - 0.0811, length + 0.0922],
        "per_position": [round(0.8123 * 0.79**i, 4) for i in range(k)],
        "lossless_prompts": 79 if temperature == 0 else None,
        "tokens_per_second": 1234.56 + k, "baseline_tokens_per_second": 512.25, **changes,
    }  # fmt: skip


ACCEPTANCE = {
    "provenance": MEASURED_ON,
    "rows": [
        acceptance_row("human_eval", 3, 2.8461),
        acceptance_row("human_eval", 5, 3.4049),
        acceptance_row("mt_bench", 3, 2.4312),
        acceptance_row("mt_bench", 5, 2.6127),
        acceptance_row("human_eval", 5, 3.1062, temperature=0.7),
    ],
}


def bench_row(concurrency, drafter, otps, **changes):
    row = acceptance_row("mt_bench", 5, 2.6127, tokens_per_second=otps)
    if drafter is None:
        row |= {"k": None, "acceptance_length": None, "per_position": None}
    return row | {
        "concurrency": concurrency, "drafter": drafter, "latency_p50_s": 1.2345 / concurrency,
        "latency_p95_s": 2.3456, "latency_p99_s": 3.4567, "ttft_p50_s": 0.0456,
        "speedup": None if drafter is None else 1.7654, **changes,
    }  # fmt: skip


BENCH = {
    "provenance": {"step": 1234, "cpu": "Grace", "cores": 72, "gpu": "NVIDIA B200"},
    "rows": [bench_row(c, d, (900 if d else 512) * c**0.8) for d in (None, "/data/run/drafter")
             for c in (1, 2, 8)],
}  # fmt: skip

TRAIN_CSV = """epoch,step,train/loss,val/loss,val/accuracy_d0,val/accuracy_d1
0,10,3.1,,,
0,99,,2.9,0.31,0.12
0,110,2.2,,,
1,199,,2.1,0.52,0.29
1,299,,1.9,0.61,0.38
"""


def make_run(folder, *, provenance=None, drafter=None, validate=None, acceptance=None, bench=None,
             train_csv=None):  # fmt: skip
    """A run folder that holds exactly the files given."""
    for name, document in {
        "provenance.json": provenance,
        "metrics/validate.json": validate,
        "metrics/acceptance.json": acceptance,
        "metrics/bench.json": bench,
        "drafter/config.json": drafter,
    }.items():
        if document is not None:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(document))
    if drafter is not None:
        tensors = {"fc.weight": np.ones((6, 7), "float32"), "d2t": np.zeros(5, "int64")}
        save_file(tensors, folder / "drafter/model.safetensors")
    if train_csv is not None:
        (folder / "metrics/train.csv").write_text(train_csv)
    return folder


def full_run(folder):
    return make_run(folder, provenance=PROVENANCE, drafter=DRAFTER, validate=VALIDATE,
                    acceptance=ACCEPTANCE, bench=BENCH, train_csv=TRAIN_CSV)  # fmt: skip


def embedded_run(folder):
    """A run on a CPU with the embedded target: validated, never decoded."""
    provenance = PROVENANCE | {
        "target": {"name_or_path": "tiny", "revision": None, "license": "psf-2.0"},
        "environment": PROVENANCE["environment"] | {"gpu": None, "git_commit": None},
    }
    return make_run(folder, provenance=provenance, drafter=DRAFTER, validate=VALIDATE,
                    train_csv=TRAIN_CSV)  # fmt: skip


def folder_run(folder):
    """A target in a folder, decoded once without intervals, its data set not on the Hub."""
    provenance = PROVENANCE | {
        "target": {"name_or_path": "/home/someone/models/my llama"},
        "data": {"datasets": ["stdlib functions"]},
    }
    row = acceptance_row("built_in", 5, 1.9876, acceptance_length_ci95=None)
    acceptance = {"rows": [row | {"tokens_per_second": None, "lossless_prompts": None}]}
    return make_run(folder, provenance=provenance, drafter=DRAFTER, acceptance=acceptance)


def eagle3_run(folder):
    """The baseline on its own, tested and benched beside a P-EAGLE drafter."""
    drafter = {key: value for key, value in DRAFTER.items() if not key.endswith(("token", "id"))}
    rows = [{**row, "method": "eagle3"} for row in ACCEPTANCE["rows"]]
    beside = [{**row, "method": "p-eagle", "acceptance_length": 9.87} for row in ACCEPTANCE["rows"]]
    bench = [
        bench_row(1, None, 512, method=None),
        bench_row(1, "/data/run/drafter", 700, method="eagle3"),
        bench_row(1, "/data/other/drafter", 900, method="p-eagle"),
    ]
    return make_run(folder, provenance=PROVENANCE, bench={"rows": bench},
                    drafter={**drafter, "parallel_drafting": False},
                    acceptance={"provenance": MEASURED_ON, "rows": rows + beside})  # fmt: skip


def empty_run(folder):
    return make_run(folder)


RUNS = [full_run, embedded_run, folder_run, empty_run]


@functools.cache
def card(run, options=None):
    """The README of one of RUNS; the folder it was made from is gone by the time it is read."""
    with tempfile.TemporaryDirectory() as folder:
        made = run(Path(folder))
        run_files = RunFiles.read(made, made / "drafter")
    return render(run_files, options)


def section(card, title):
    """The text between a heading and the next one."""
    return re.split(r"\n#+ ", card.split(f" {title}\n", 1)[1], maxsplit=1)[0]


def tables_in(markdown):
    """Every pipe table as a list of rows, each a dict from header to unescaped cell."""
    found = []
    for block in re.findall(r"(?:^\|.*\|$\n?)+", markdown, flags=re.M):
        lines = [
            [re.sub(r"\\(.)", r"\1", cell).strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            for line in block.strip().split("\n")
        ]
        header, rule, *rows = lines
        assert all(re.fullmatch(":?-+:?", cell) for cell in rule)
        assert all(len(row) == len(header) for row in rows)
        found.append([dict(zip(header, row, strict=True)) for row in rows])
    return found


def block(card, language, holding):
    blocks = re.findall(rf"```{language}\n(.*?)```", card, flags=re.S)
    (found,) = [b for b in blocks if holding in b]
    return found


def outline(page):
    """What a reader sees of a page's structure: headings, fences, plots, shapes of tables."""
    marks = re.findall(r"^(?:#+ (?!P-EAGLE).*|`{3,}.*|!\[.*|- \*\*\w+)", page, flags=re.M)
    return marks, [(len(table), list(table[0])) for table in tables_in(page)]
