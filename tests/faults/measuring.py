"""Bodies of processes that measure their own memory and speed; each starts clean and reports one
figure."""

import os
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from peagle.cod.sampling import Cod, sample_rows
from peagle.cod.segments import Segment
from peagle.model.config import PEagleConfig
from peagle.model.p_eagle import PEagleDrafter
from peagle.store.manifest import Manifest
from peagle.store.reader import Store
from peagle.store.sample import Sample
from peagle.store.writer import StoreWriter
from peagle.target.head import TargetHead
from peagle.train.buffers import Buffers
from peagle.train.objective import objective
from peagle.train.packed_sequences import PackedSequences
from peagle.train.packing import Batch, pack
from peagle.train.prefetch import ReadAhead
from peagle.train.sampler import PackSampler

MEGABYTE = 1_000_000


def peak_bytes() -> int:
    """The most memory that this process ever held, or held since ``forget_peak``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("Linux only")


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def peak_of_step(segments: int) -> int:
    """Bytes that forward and backward of one sequence add, cut into so many segments."""
    torch.manual_seed(0)
    length, width = 1024, 128
    config = PEagleConfig(
        hidden_size=width,
        intermediate_size=512,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        num_hidden_layers=4,
        vocab_size=512,
        mask_token_id=5,
        eagle_aux_hidden_state_layer_ids=(1, 2, 3),
    )
    drafter = PEagleDrafter(config)
    head = TargetHead(
        norm=torch.ones(width),
        head=torch.randn(512, width),
        embedding=torch.randn(512, width),
        eps=1e-6,
        softcap=None,
    )
    slots = pack([random_sample(length, width, 0)])
    bounds = torch.linspace(0, len(slots["tokens"]), segments + 1).long().tolist()
    batch = Batch(**slots, segments=tuple(Segment(a, b) for a, b in pairwise(bounds)), seed=0)
    cod, generator = Cod(8, 0.9), torch.Generator().manual_seed(0)
    rows = sample_rows(batch.supervised, batch.document, cod=cod, generator=generator)
    assert len(rows.anchor) > 4 * length
    forget_peak()
    before = peak_bytes()
    objective(drafter, head, batch, rows, mix={"kl": 1.0}).loss.backward()
    return peak_bytes() - before


def random_sample(length: int, width: int, seed: int) -> Sample:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(length, dtype=torch.bool)
    mask[:3] = False
    return Sample(
        input_ids=torch.randint(6, 64, (length,), generator=generator),
        loss_mask=mask,
        aux=torch.randn(length, 3 * width, generator=generator).bfloat16(),
        final=torch.randn(length, width, generator=generator).bfloat16(),
    )


def write_store(folder: Path, manifest: Manifest, samples: int, length: int) -> None:
    """Samples that are all the same but for their names: only their bytes count."""
    sample = random_sample(length, manifest.hidden_size, 0)
    writer = StoreWriter(folder, shard_bytes=16 * MEGABYTE)
    for number in range(samples):
        writer.append(f"{number:016x}", "train", Sample(*(tensor.clone() for tensor in sample)))
    writer.flush()
    manifest.write(folder)


def loader_of(folder: Path, max_tokens: int) -> ReadAhead:
    """All batches, read as in training."""
    store = Store(folder)
    samples = store.split("train")
    lengths = [store.entries[i].tokens - 2 for i in samples]
    sampler = PackSampler(
        samples, lengths, max_tokens=max_tokens, seed=0, rank=0, world_size=1, done=lambda: 0
    )
    data = PackedSequences(
        store, cod=Cod(4, 0.8), max_rows=10**6, mask_token_id=5, buffers=Buffers()
    )
    return ReadAhead(data.__getitem__, sampler, threads=2)


def read_epoch(loader: ReadAhead) -> int:
    """Bytes of the hidden states of all batches."""
    return sum(tensor.nbytes for batch in loader for tensor in batch[2:4])


def peak_of_epoch(folder: Path) -> int:
    assert read_epoch(loader_of(folder, 1024)) > 0
    return peak_bytes()


def drop_from_cache(folder: Path) -> None:
    """So that the next reader waits for the disk, as with a store larger than the memory."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def read_raw(folder: Path) -> int:
    size, buffer = 0, bytearray(MEGABYTE)
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                size += count
    return size


def speeds(folder: Path) -> tuple[float, float]:
    """Bytes per second of disk and loader from a cold cache, in turn, the best of five each."""
    loader, rates = loader_of(folder, 4096), []
    for read, source in [(read_raw, folder), (read_epoch, loader)] * 5:
        drop_from_cache(folder)
        begin = time.monotonic()
        rates.append(read(source) / (time.monotonic() - begin))
    return max(rates[0::2]), max(rates[1::2])


def as_process(connection: Any, name: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    connection.send(globals()[name](*arguments))
