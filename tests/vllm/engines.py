"""Runs inside vLLM's environment: one engine after the other in one process, asked by JSON lines.

Importing vLLM takes far longer than making a tiny engine, so all tests share this process. It
answers on the descriptor that standard output was; vLLM's logging goes to standard error.
"""

import gc
import json
import os
import sys

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)

from vllm import LLM, SamplingParams, TokensPrompt  # noqa: E402 (it logs while it is imported)
from vllm.distributed import cleanup_dist_env_and_memory  # noqa: E402


def generate(job):
    """Greedy answers to the job's prompts, and the engine's counters of speculative decoding."""
    engine = LLM(**job["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=job["max_new_tokens"])
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in job["prompts"]]
    outputs = engine.generate(prompts, sampling, use_tqdm=False)
    counters = {
        metric.name.removeprefix("vllm:spec_decode_num_"): getattr(
            metric, "values", getattr(metric, "value", None)
        )
        for metric in engine.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_")
    }
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    engine.llm_engine.engine_core.shutdown()
    return {"tokens": tokens, "counters": counters}


for line in sys.stdin:
    try:
        answer = generate(json.loads(line))
    except Exception as error:  # the test that asked shows it
        answer = {"error": f"{type(error).__name__}: {error}"}
    gc.collect()
    cleanup_dist_env_and_memory()
    print(json.dumps(answer), file=answers, flush=True)
