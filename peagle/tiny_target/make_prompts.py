"""Choose the built-in prompts: ``python -m peagle.tiny_target.make_prompts --out DIR``.

A small model sometimes repeats itself without end, and where it does, acceptance length says
nothing about a drafter. So a prompt is kept only if the target's greedy answer ends by itself and
does not repeat; the choice looks at the target alone. ``train`` comes from functions that the
target was trained on, ``test`` from functions that it has never seen.
"""

import argparse
import hashlib
import json
from collections import Counter
from pathlib import Path

import torch
from tqdm import tqdm

from peagle.capture.chat import prompt_ids
from peagle.decode.decoder import Decoder
from peagle.target.end_tokens import end_tokens
from peagle.target.target import TargetSource
from peagle.tiny_target.corpus import Function, read_functions, standard_library

MAX_NEW_TOKENS = 224
BATCH = 128


def repeats(text: str) -> bool:
    """Whether a line occurs four times, or a run of six words three times."""
    lines = Counter(line.strip() for line in text.splitlines() if len(line.strip()) > 3)
    words = text.split()
    runs = Counter(tuple(words[i : i + 6]) for i in range(len(words) - 5))
    return max(lines.values(), default=0) >= 4 or max(runs.values(), default=0) >= 3


def choose(target: TargetSource, functions: list[Function], limit: int) -> list[str]:
    """The first ``limit`` prompts that the target answers without repeating itself."""
    model, tokenizer = target.model(dtype=torch.float32, device="cpu"), target.tokenizer()
    decoder = Decoder(model, None, eos_ids=end_tokens(model, tokenizer))
    chosen: list[str] = []
    with tqdm(total=limit, disable=None) as bar:
        for start in range(0, len(functions), BATCH):
            prompts = [function.prompt for function in functions[start : start + BATCH]]
            ids = [prompt_ids(tokenizer, [{"role": "user", "content": p}]) for p in prompts]
            decoded = decoder.decode(ids, k=0, temperature=0.0, max_new_tokens=MAX_NEW_TOKENS)
            for prompt, tokens in zip(prompts, decoded.tokens, strict=True):
                text = tokenizer.decode(tokens, skip_special_tokens=True)
                if tokens[-1] in decoder.eos_ids and len(text) > 60 and not repeats(text):
                    chosen.append(prompt)
            bar.update(min(limit, len(chosen)) - bar.n)
            if len(chosen) >= limit:
                break
    return chosen[:limit]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the target")
    parser.add_argument("--stdlib", type=Path, nargs="*", default=[standard_library()])
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--test", type=int, default=200)
    args = parser.parse_args()
    documented = [f for f in read_functions(args.stdlib) if f.documented]
    trained = {f.prompt for f in documented if not f.held_out}
    for split, limit in (("test", args.test), ("train", args.train)):
        pool = [f for f in documented if f.held_out == (split == "test")]
        if split == "test":  # another module may have the same signature and docstring
            pool = [f for f in pool if f.prompt not in trained]
        pool = list({f.prompt: f for f in pool}.values())
        pool.sort(key=lambda f: hash_order(f.name))
        chosen = choose(TargetSource(str(args.out)), pool, limit)
        with open(args.out / f"prompts_{split}.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps({"prompt": prompt}) + "\n" for prompt in chosen)
        print(f"{split}: {len(chosen)} of {len(pool)} functions")


def hash_order(name: str) -> str:
    return hashlib.sha256(f"order {name}".encode()).hexdigest()


if __name__ == "__main__":
    main()
