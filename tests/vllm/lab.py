"""What the serving tests share: drafters trained by ``fit``, and vLLM engines in one process."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import Future, ThreadPoolExecutor
from importlib import resources
from pathlib import Path
from threading import Lock
from typing import NamedTuple

import yaml
from targets import make_target

from peagle.capture.chat import prompt_ids
from peagle.capture.prompts import PromptSource, load_prompts
from peagle.target.target import TargetSource

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LAYOUT = {3: "eagle3", 5: "speculators", 7: "eagle3"}  # of the folder that is served at each K
PROMPTS, NEW_TOKENS = 48, 64
EPOCHS = 8
ONE_CORE = {"OMP_NUM_THREADS": "1"}  # two drafters are trained at once


class Case(NamedTuple):
    """A drafter: for which target, of which vocabulary, and with what options of ``fit``."""

    target: str
    pruned: bool
    options: dict[str, object]
    parallel: bool = True  # P-EAGLE's way of drafting; else EAGLE-3's


CASES = {
    "tiny target, 4 layers": Case("tiny", False, {"model.num_layers": 4}),
    "Llama, 2 layers, fc_norm": Case(
        "llama", False, {"model.num_layers": 2, "model.fc_norm": "true"}
    ),
    "Qwen3, 4 layers, pruned": Case(
        "qwen3",
        True,
        {
            "model.num_layers": 4,
            "capture.layer_ids": "[0, 3, 6]",  # the embedding, and the last layer before its norm
        },
    ),
    "tiny target, 2 layers, pruned, fc_norm": Case(
        "tiny", True, {"model.num_layers": 2, "model.fc_norm": "true"}
    ),
    "tiny target, autoregressive": Case(
        "tiny",
        False,
        {
            "model.drafter": "eagle3",
            "model.num_layers": 1,
            "model.cod.keep_ratio": 1.0,
            "model.depth_decay": 0.8,
            "model.fc_norm": "true",
        },
        parallel=False,
    ),
}


class Lab:
    """Makes targets and trains drafters, each once, in one folder; two at a time."""

    def __init__(self, folder):
        self.folder = folder
        self.pool = ThreadPoolExecutor(2)
        self.runs: dict[str, Future] = {}
        self.stores = defaultdict(Lock)  # drafters of one target share its store

    def target(self, name):
        if name == "tiny":
            return str(resources.files("peagle.tiny_target"))
        folder = self.folder / name
        if not folder.exists():
            make_target(name, folder)
        return str(folder)

    def begin(self, names):
        """Start training these drafters, as far as that has not been done."""
        for name in names:
            if name not in self.runs:
                self.target(CASES[name].target)
                self.runs[name] = self.pool.submit(self.train, name)

    def run(self, name):
        """The run folder of a case: ``fit`` has trained, exported and tested."""
        self.begin([name])
        return self.runs[name].result()

    def train(self, name):
        case = CASES[name]
        run_dir = self.folder / f"run-{list(CASES).index(name)}"
        target = self.target(case.target)
        options = {
            "config": ROOT / "configs" / "quickstart.yaml",
            "target": target,
            "run_dir": run_dir,
            "store": self.folder / f"store-{case.target}",
            "trainer.max_epochs": EPOCHS,
            "trainer.check_val_every_n_epoch": EPOCHS,
            "capture.prompts": [{"source": "stdlib", "split": "train", "limit": 160}],
            "capture.max_new_tokens": NEW_TOKENS,
            "capture.greedy_share": 1.0,
            # As the engine computes, and as fast where a processor has no bf16 instructions.
            "capture.dtype": "float32",
            "trainer.precision": "32-true",
            "data.max_tokens": 768,
            "evaluation.prompts": [{"source": "stdlib", "split": "test", "limit": PROMPTS}],
            "evaluation.k": list(LAYOUT),
            "evaluation.max_new_tokens": NEW_TOKENS,
            "evaluation.batch_size": 16,
            **case.options,
        }
        if case.pruned:
            options["model.draft_vocab_size"] = 2 * TargetSource(target).config().vocab_size // 3
        with self.stores[case.target]:
            peagle("fit", options, ONE_CORE)
        k = next(k for k, layout in LAYOUT.items() if layout == "speculators")
        self.export(run_dir, target, k)
        return run_dir

    def export(self, run_dir, target, k):
        """The same drafter once more, in the layout that needs no further settings."""
        options = {
            "ckpt_path": run_dir / "checkpoints" / "last.ckpt",
            "out": run_dir / "speculators",
            "format": "speculators",
            "target": target,
            "k": k,
        }
        peagle("export", options, ONE_CORE)

    def tested(self, name, k):
        """What ``peagle test`` measured for a case: its row of ``acceptance.json``."""
        rows = json.loads((self.run(name) / "metrics" / "acceptance.json").read_text())["rows"]
        return next(row for row in rows if row["k"] == k)

    def prompts(self, target):
        tokenizer = TargetSource(self.target(target)).tokenizer()
        prompts = load_prompts(PromptSource("stdlib", "test", limit=PROMPTS))
        return [prompt_ids(tokenizer, prompt.opening()) for prompt in prompts]

    def close(self):
        self.pool.shutdown(cancel_futures=True)


def peagle(command, options, environment):
    """Run ``python -m peagle`` as a user does; lists are given as YAML."""
    arguments = [f"--{key}={as_yaml(value)}" for key, value in options.items()]
    result = subprocess.run(
        [sys.executable, "-m", "peagle", command, *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, (result.returncode, result.stderr[-3000:])
    return result.stdout


def as_yaml(value):
    if isinstance(value, list):
        return yaml.safe_dump(value, default_flow_style=True, width=10_000).strip()
    return str(value)


class Engines:
    """vLLM engines, one after the other, in one process of vLLM's environment."""

    def __init__(self, process, lab):
        self.process, self.lab = process, lab
        self.known = {}

    def alone(self, target):
        """Answers of the target without a drafter."""
        if target not in self.known:
            self.known[target] = self.ask(target, {"model": self.lab.target(target)})
        return self.known[target]

    def drafted(self, name, k):
        """Answers with the drafter of a case, K drafts at a time."""
        if (name, k) not in self.known:
            target = CASES[name].target
            if LAYOUT[k] == "speculators":  # the folder names target and K itself
                served = {"model": str(self.lab.run(name) / "speculators")}
            else:
                folder = self.lab.run(name) / "drafter"
                served = self.plain(target, folder, k, parallel=CASES[name].parallel)
            self.known[name, k] = self.ask(target, served)
        return self.known[name, k]

    def plain(self, target, drafter, k, parallel=True):
        """Settings of an engine for a folder in the plain layout."""
        config = {
            "method": "eagle3",
            "model": str(drafter),
            "num_speculative_tokens": k,
            "parallel_drafting": parallel,
        }
        return {"model": self.lab.target(target), "speculative_config": config}

    def ask(self, target, served, max_new_tokens=NEW_TOKENS):
        engine = {
            **served,
            "dtype": "float32",  # in bf16 near ties go either way
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_num_seqs": 16,
            "disable_log_stats": False,
            "distributed_executor_backend": "uni",
        }
        prompts = self.lab.prompts(target)
        job = {"engine": engine, "prompts": prompts, "max_new_tokens": max_new_tokens}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, (self.lab.folder / "engines.log").read_text()[-3000:]
        answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer


def shares(counters):
    """Share of verifications in which each position was accepted, by the engine's counters."""
    return [count / counters["drafts"] for count in counters["accepted_tokens_per_pos"]]
