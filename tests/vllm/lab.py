"""What the serving tests share: drafters trained by ``fit``, and vLLM engines in one process."""

import json
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import yaml
from targets import make_target

from peagle.data.chat import prompt_ids
from peagle.data.prompts import PromptSource, load_prompts
from peagle.model.target import TargetSource

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
K = (3, 5, 7)
PROMPTS, NEW_TOKENS = 48, 64


class Case(NamedTuple):
    """A drafter: for which target, and with what options of ``fit``."""

    target: str
    options: dict[str, object]


CASES = {
    "tiny target, 4 layers": Case("tiny", {"model.num_layers": 4}),
    "tiny target, 2 layers, pruned, fc_norm": Case(
        "tiny", {"model.num_layers": 2, "model.draft_vocab_size": 1024, "model.fc_norm": "true"}
    ),
    "Llama, 2 layers, fc_norm": Case("llama", {"model.num_layers": 2, "model.fc_norm": "true"}),
    "Qwen3, 4 layers, pruned": Case(
        "qwen3",
        {
            "model.num_layers": 4,
            "model.draft_vocab_size": 1024,
            "capture.layer_ids": "[0, 3, 6]",  # the embedding, and the last layer before its norm
        },
    ),
}


class Lab:
    """Makes targets and trains drafters, each once, in one folder."""

    def __init__(self, folder):
        self.folder = folder

    def target(self, name):
        if name == "tiny":
            return str(resources.files("peagle.tiny_target"))
        folder = self.folder / name
        if not folder.exists():
            make_target(name, folder)
        return str(folder)

    def run(self, name):
        """The run folder of a case: ``fit`` trains, exports and tests."""
        case = CASES[name]
        run_dir = self.folder / f"run-{list(CASES).index(name)}"
        if (run_dir / "metrics" / "acceptance.json").exists():
            return run_dir
        options = {
            "config": ROOT / "configs" / "quickstart.yaml",
            "target": self.target(case.target),
            "run_dir": run_dir,
            "store": self.folder / f"store-{case.target}",
            "trainer.logger.init_args.path": run_dir / "metrics" / "train.csv",
            "trainer.max_epochs": 8,
            "capture.prompts": [{"source": "stdlib", "split": "train", "limit": 160}],
            "capture.max_new_tokens": NEW_TOKENS,
            "capture.greedy_share": 1.0,
            "evaluation.prompts": [{"source": "stdlib", "split": "test", "limit": PROMPTS}],
            "evaluation.k": list(K),
            "evaluation.max_new_tokens": NEW_TOKENS,
            "evaluation.batch_size": 16,
            **case.options,
        }
        peagle("fit", options)
        return run_dir

    def tested(self, name, k):
        """What ``peagle test`` measured for a case: its row of ``acceptance.json``."""
        rows = json.loads((self.run(name) / "metrics" / "acceptance.json").read_text())["rows"]
        return next(row for row in rows if row["k"] == k)

    def prompts(self, target):
        tokenizer = TargetSource(self.target(target)).tokenizer()
        prompts = load_prompts(PromptSource("stdlib", "test", limit=PROMPTS))
        return [prompt_ids(tokenizer, prompt.opening()) for prompt in prompts]


def peagle(command, options):
    """Run ``python -m peagle`` as a user does; lists are given as YAML."""
    arguments = [f"--{key}={as_yaml(value)}" for key, value in options.items()]
    result = subprocess.run(
        [sys.executable, "-m", "peagle", command, *arguments],
        cwd=ROOT,
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
        return self.once(target, None, k=0, max_new_tokens=NEW_TOKENS)

    def drafted(self, name, k, max_new_tokens=NEW_TOKENS):
        """Answers with the drafter of a case, K drafts at a time."""
        drafter = self.lab.run(name) / "drafter"
        return self.once(CASES[name].target, drafter, k=k, max_new_tokens=max_new_tokens)

    def once(self, target, drafter, **settings):
        key = (target, drafter, *settings.items())
        if key not in self.known:
            self.known[key] = self.ask(target, drafter, **settings)
        return self.known[key]

    def ask(self, target, drafter, *, k, max_new_tokens):
        engine = {
            "model": self.lab.target(target),
            "dtype": "float32",  # in bf16 near ties go either way
            "enforce_eager": True,
            "enable_prefix_caching": False,
            "max_model_len": 1024,
            "max_num_seqs": 16,
            "disable_log_stats": False,
            "distributed_executor_backend": "uni",
        }
        if drafter is not None:
            engine["speculative_config"] = {
                "method": "eagle3",
                "model": str(drafter),
                "num_speculative_tokens": k,
                "parallel_drafting": True,
            }
        prompts = self.lab.prompts(target)
        job = {"engine": engine, "prompts": prompts, "max_new_tokens": max_new_tokens}
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer


def shares(counters):
    """Share of verifications in which each position was accepted, by the engine's counters."""
    return [count / counters["drafts"] for count in counters["accepted_tokens_per_pos"]]
