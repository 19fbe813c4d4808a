"""Rate of the loader against the rate of the disk, and its memory, on stores of two sizes.

    python benchmarks/loader.py --gigabytes 2

Files are dropped from the page cache before each reading. ``raw`` reads the shards one after the
other in pieces of 8 MB; ``loader`` is what training iterates over: lazy reads through the index in
the order of an epoch, hashes checked, documents packed, segments cut. They are read in turn, and
the best of three rates counts. The memory is the most during equally many batches of both stores,
that is, ten epochs of the smaller one.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from report import machine, save, table

from peagle.cod.sampling import Cod
from peagle.decode.evaluation import EvaluationConfig
from peagle.store.manifest import Manifest
from peagle.store.reader import Store
from peagle.store.sample import Sample
from peagle.store.writer import StoreWriter
from peagle.train.datamodule import HiddenStatesDataModule
from peagle.train.prefetch import ReadAhead
from peagle.train.sampler import fill_packs, shuffle_packs

WIDTH, LAYERS, LENGTH, PIECE = 1024, (2, 12, 21), 2048, 8 * 2**20
"""A target of the size of Qwen3-0.6B; conversations of 2,048 tokens, 16.8 MB each."""


def make_store(folder: Path, gigabytes: float) -> None:
    manifest = Manifest(
        target="random", revision=None, fingerprint="0", layer_ids=LAYERS, hidden_size=WIDTH,
        vocab_size=8192, num_layers=24, dtype="bfloat16", tokenizer="0", rms_norm_eps=1e-6,
        softcap=None, block={}, answers="0",
    )  # fmt: skip
    writer = StoreWriter(folder, shard_bytes=512 * 10**6, identity=manifest.identity())
    size = LENGTH * WIDTH * (len(LAYERS) + 1) * 2
    for number in range(round(gigabytes * 1e9 / size)):
        states = torch.randn(LENGTH, WIDTH * (len(LAYERS) + 1)).to(torch.bfloat16)
        sample = Sample(
            input_ids=torch.randint(1, 8192, (LENGTH,)),
            loss_mask=torch.ones(LENGTH, dtype=torch.bool),
            aux=states[:, :-WIDTH],
            final=states[:, -WIDTH:],
        )
        writer.append(f"{number:016x}", "train", sample)
    writer.flush()
    manifest.write(folder)


def drop(folder: Path) -> int:
    """Put the files out of the page cache; returns their bytes."""
    os.sync()
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return sum(path.stat().st_size for path in folder.iterdir())


def read_raw(folder: Path) -> Iterable[int]:
    buffer = bytearray(PIECE)
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                yield count


def loader_of(folder: Path, workers: int) -> ReadAhead:
    data = HiddenStatesDataModule(
        target="random", revision=None, store=str(folder), cod=Cod(), mask_token_id=0,
        evaluation=EvaluationConfig(), num_workers=workers, max_tokens=2 * LENGTH,
    )  # fmt: skip
    data.store = Store(folder)
    numbers = data.store.split("train")
    lengths = [data.slots(i) for i in numbers]
    packs = fill_packs(numbers, lengths, max_tokens=data.max_tokens, seed=0)
    return data.loader(shuffle_packs(packs, seed=0, epoch=0), data.cod)


def timed(folder: Path, pieces: Iterable[Any]) -> float:
    """Bytes of the store per second."""
    size, start = drop(folder), time.perf_counter()
    for _ in pieces:
        pass
    return size / (time.perf_counter() - start)


def measured(folder: Path, gigabytes: float, workers: int, epochs: int) -> dict[str, float]:
    loader = loader_of(folder, workers)
    raw, rate = zip(
        *((timed(folder, read_raw(folder)), timed(folder, loader)) for _ in range(3)), strict=True
    )
    return {
        "store_gb": gigabytes,
        "workers": workers,
        "raw_mb_per_second": max(raw) / 1e6,
        "loader_mb_per_second": max(rate) / 1e6,
        "share_of_raw": max(rate) / max(raw),
        "memory_gb": max(resident() for _ in range(epochs) for _ in loader) / 1e9,
    }


def resident() -> int:
    """Memory of this process; cached pages of files, which can be had back, do not count."""
    return sum(
        int(line.split()[1]) * 1024
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(("RssAnon:", "RssShmem:"))
    )


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call it in a process of its own: memory that others have used does not count."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="of the larger store")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2])
    parser.add_argument("--folder", type=Path, help="where the stores are made, then removed")
    args = parser.parse_args()
    facts = {"machine": machine()}
    rows = []
    for gigabytes, epochs in ((args.gigabytes / 10, 10), (args.gigabytes, 1)):
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            alone(make_store, folder, gigabytes)
            for workers in args.workers:
                rows.append(alone(measured, folder, gigabytes, workers, epochs))
    print(table(rows))
    print(f"written to {save('loader', rows, keys=('store_gb', 'workers'), **facts)}")


if __name__ == "__main__":
    main()
