"""A run that trains in seconds: the real command line on a store of random hidden states.

As a script it is ``python -m peagle``, except that nothing is captured before and nothing decoded
after ``fit``, because no target has these hidden states.
"""

import multiprocessing
import os
import sys
from pathlib import Path

import torch

import peagle.cli
from peagle.__main__ import main
from peagle.store.manifest import Manifest
from peagle.store.sample import Sample
from peagle.store.writer import StoreWriter
from peagle.target.head import TargetHead
from peagle.target.layers import TargetLayers

WIDTH, VOCABULARY, LAYER_IDS = 32, 64, (1, 2, 3)
SAMPLES, MASK_TOKEN = 60, 5
HERE = Path(__file__).parent


class ToyCLI(peagle.cli.PEagleCLI):
    """The command line without a target."""

    def before_fit(self) -> None:
        pass

    def after_fit(self) -> None:
        pass


def run_toy() -> None:
    """What ``python -m peagle`` does with ``sys.argv``."""
    torch.set_num_threads(1)
    peagle.cli.PEagleCLI = ToyCLI
    main()


def as_process(arguments: list[str], environment: dict[str, str], log: str) -> None:
    """Body of a forked process: the toy run, its output in a file."""
    os.setsid()  # a process group of its own, so that a signal to all of it ends there
    multiprocessing.set_start_method("fork", force=True)  # for the loader's workers, as usual
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    sys.argv = [str(HERE / "toy.py"), *arguments]
    run_toy()


def make_sample(number: int) -> Sample:
    generator = torch.Generator().manual_seed(number)
    length = 10 + number * 7 % 31
    states = torch.randn(length, (len(LAYER_IDS) + 1) * WIDTH, generator=generator)
    mask = torch.ones(length, dtype=torch.bool)
    mask[:3] = False
    return Sample(
        input_ids=torch.randint(6, VOCABULARY, (length,), generator=generator),
        loss_mask=mask,
        aux=states[:, :-WIDTH].bfloat16().contiguous(),
        final=states[:, -WIDTH:].bfloat16().contiguous(),
    )


def make_manifest() -> Manifest:
    return Manifest(
        target="random",
        revision=None,
        fingerprint="f00d",
        layer_ids=LAYER_IDS,
        hidden_size=WIDTH,
        vocab_size=VOCABULARY,
        num_layers=4,
        dtype="bfloat16",
        tokenizer="beef",
        rms_norm_eps=1e-6,
        softcap=None,
        block={
            "hidden_size": WIDTH,
            "intermediate_size": 64,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            "max_position_embeddings": 512,
        },
        answers="cafe",
    )


def split(number: int) -> str:
    return "val" if number % 10 == 4 else "train"


def make_store(folder: Path, manifest: Manifest | None = None) -> Path:
    """Random conversations in shards of ten; every tenth is for validation."""
    manifest = manifest or make_manifest()
    writer = StoreWriter(folder, shard_bytes=10**9, identity=manifest.identity())
    for number in range(SAMPLES):
        writer.append(f"{number:016x}", split(number), make_sample(number))
        if number % 10 == 9:
            writer.flush()
    writer.flush()
    generator = torch.Generator().manual_seed(0)
    TargetHead(
        norm=torch.rand(WIDTH, generator=generator) + 0.5,
        head=torch.randn(VOCABULARY, WIDTH, generator=generator),
        embedding=torch.randn(VOCABULARY, WIDTH, generator=generator),
        eps=1e-6,
        softcap=None,
    ).save(folder / "target.safetensors", manifest.identity())
    TargetLayers({}).save(folder / "target_layers.safetensors", manifest.identity())
    manifest.write(folder)
    return folder


if __name__ == "__main__":
    run_toy()
