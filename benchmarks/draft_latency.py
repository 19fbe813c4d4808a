"""What a round of drafting costs at K, for P-EAGLE (one pass) and EAGLE-3 (K passes).

    python benchmarks/draft_latency.py --k 1 7 --layers 1 4

Both drafters have the same layers, of the embedded target's shape, and draft in the loop that
``test`` uses. Weights are random: a pass takes as long whatever it guesses. Settings take turns,
so that all meet the same states of the machine; a figure is the median over rounds, without each
answer's first, which reads the prompt. ``ratio`` compares with the smallest K.
"""

import argparse
from dataclasses import replace
from itertools import product
from statistics import median

import torch
from report import machine, save, table

from peagle.capture.chat import prompt_ids
from peagle.capture.config import CaptureConfig
from peagle.capture.identity import manifest_fields
from peagle.capture.prompts import PromptSource, load_prompts
from peagle.decode.decoder import Decoder
from peagle.model.build import build_drafter
from peagle.model.config import PEagleConfig
from peagle.target.target import TargetSource

PROMPTS = PromptSource("stdlib", "test")
PARALLEL = {"p-eagle": True, "eagle3": False}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--k", type=int, nargs="+", default=[1, 3, 5, 7])
    parser.add_argument("--layers", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new_tokens", type=int, default=32)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    facts = {"device": args.device, "threads": torch.get_num_threads(), "machine": machine()}
    rows = [row for layers in args.layers for row in measured(layers, args)]
    print(table(rows))
    path = save("draft_latency", rows, keys=("layers", "method", "k"), **facts)
    print(f"written to {path}")


def measured(layers: int, args: argparse.Namespace) -> list[dict]:
    """One row for each kind and K."""
    source = TargetSource("tiny")
    target = source.model(dtype=torch.float32, device=args.device)
    tokenizer = source.tokenizer()
    prompts = [
        prompt_ids(tokenizer, prompt.opening())
        for prompt in load_prompts(replace(PROMPTS, limit=args.prompts))
    ]
    decoders = {
        method: Decoder(target, drafter_for(source, method, layers, args), eos_ids=set())
        for method in PARALLEL
    }
    seconds: dict[tuple[str, int], list[float]] = {}
    settings = list(product(PARALLEL, args.k))
    for _, prompt, (method, k) in product(range(args.turns), prompts, settings):
        decoded = decoders[method].decode(
            [prompt], k=k, temperature=0.0, max_new_tokens=args.new_tokens
        )
        seconds.setdefault((method, k), []).extend(decoded.draft_seconds[1:])
    return [
        {
            "layers": layers,
            "method": method,
            "k": k,
            "rounds": len(seconds[method, k]),
            "ms_per_round": 1000 * median(seconds[method, k]),
            "ratio": median(seconds[method, k]) / median(seconds[method, min(args.k)]),
        }
        for method, k in settings
    ]


def drafter_for(source: TargetSource, method: str, layers: int, args: argparse.Namespace):
    shape = manifest_fields(source.config(), CaptureConfig(prompts=[PROMPTS]))
    config = PEagleConfig(
        **shape["block"],
        num_hidden_layers=layers,
        vocab_size=shape["vocab_size"],
        eagle_aux_hidden_state_layer_ids=shape["layer_ids"],
        parallel_drafting=PARALLEL[method],
    )
    torch.manual_seed(0)
    return build_drafter(config).eval().to(args.device)


if __name__ == "__main__":
    main()
