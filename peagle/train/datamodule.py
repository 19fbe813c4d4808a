"""Streams a store as packed sequences, each with the segments it is trained in.

order of an epoch = f(seed, epoch) -> packs of documents -> slots -> segments

Nothing random is stored: the order of an epoch and the seed of every COD draw follow from
(seed, epoch, pack), so a run resumes at any step by counting (``peagle/train/sampler.py``).
"""

import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import xxhash
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils.data import DataLoader

from peagle.cod.sampling import Cod
from peagle.decode.evaluation import EvaluationConfig, PromptBatch, prompt_batches
from peagle.kernels.device import pinned
from peagle.model.config import PEagleConfig
from peagle.progress import track
from peagle.store.errors import BadSample
from peagle.store.hub import FoundStore, HubStore, find_store, open_store, store_address
from peagle.store.reader import Store
from peagle.store.sample import Sample
from peagle.target.target import TargetSource
from peagle.train.bad_samples import BadSamples
from peagle.train.buffers import Buffers
from peagle.train.draft_vocab import token_counts
from peagle.train.memory import rows_within
from peagle.train.packed_sequences import PackedSequences
from peagle.train.packing import Batch
from peagle.train.prefetch import ReadAhead
from peagle.train.sampler import (
    Pack,
    PackSampler,
    blocks_of,
    even_out,
    fill_packs,
    refuse_other_order,
)
from peagle.train.shard_prefetch import FetchAhead, traffic

DEFAULT_ROWS = 8192  # per segment
ON_CPU = ("document", "supervised")  # the draw is made on the CPU, the same on every device


class HiddenStatesDataModule(L.LightningDataModule):
    """Training and validation batches from a hidden-state store.

    Args:
        target: ``tiny`` (embedded), a folder or a Hub id; only ``test`` opens it.
        revision: of the Hub id.
        store: folder of the store (``peagle capture`` makes it, ``fit`` does so when missing), or
            hf://datasets/OWNER/NAME/FOLDER@REVISION for one that was put on the Hub.
        cod: the COD settings of the model; given once, linked by the command line.
        mask_token_id: id of the reserved mask token, if the drafter has one; linked from the model.
        evaluation: what ``test`` decodes.
        max_tokens: slots per packed sequence; longer conversations are left out, counted.
        max_rows: rows per segment, at most; fewer rows need less memory, at some cost in speed.
            Default: what ``memory_gb`` allows, or 8192.
        memory_gb: gigabytes that a step may take beside the interpreter and its libraries: segments
            have as few rows as it takes, also where ``max_rows`` allows more. Sequences that are
            read ahead, averaged weights and what DDP keeps come on top.
        num_workers: threads that read ahead, one packed sequence each; 0 reads when asked. With a
            store on the Hub as many more fetch shards ahead.
        seed: decides the order of every epoch and every COD draw.
        block_shards: sequences are made of the samples of so many shards, drawn at random, and all
            of theirs are trained before those of others; default all shards at once. With a store
            on the Hub and a cache smaller than it, this fetches each shard once an epoch.
        cache_gb: gigabytes of shards of stores on the Hub that this machine keeps, two shards at
            least. The target's parts and the index come on top.
        on_bad_sample: ``error`` stops at a damaged sample; ``skip`` leaves it out, counted and
            named. No other sample ever takes its place.
        bad_sample_budget: share of the store that ``skip`` may leave out before it stops too; each
            process counts what it reads.
    """

    def __init__(
        self,
        target: str,
        revision: str | None,
        store: str,
        cod: Cod,
        mask_token_id: int | None,
        evaluation: EvaluationConfig,
        max_tokens: int = 8192,
        max_rows: int | None = None,
        memory_gb: float | None = None,
        num_workers: int = 2,
        seed: int = 0,
        block_shards: int | None = None,
        cache_gb: float = 50.0,
        on_bad_sample: Literal["error", "skip"] = "error",
        bad_sample_budget: float = 0.001,
    ):
        super().__init__()
        self.target, self.evaluation = TargetSource(target, revision), evaluation
        if block_shards is not None and block_shards < 1:
            raise ValueError(f"block_shards must be at least 1, got {block_shards}")
        for name, value in (("max_tokens", max_tokens), ("max_rows", max_rows)):
            if value is not None and value < 1:
                raise ValueError(f"data.{name} must be at least 1, got {value}")
        if num_workers < 0:
            raise ValueError(f"data.num_workers must not be negative, got {num_workers}")
        self.address = store_address(store)  # on the Hub; without a commit until it was asked
        self.folder, self.cod, self.mask_token_id = Path(store), cod, mask_token_id
        self.max_tokens, self.max_rows, self.memory_gb = max_tokens, max_rows, memory_gb
        self.num_workers, self.seed = num_workers, seed
        self.block_shards, self.cache_gb = block_shards, cache_gb
        self.bad = BadSamples(skip=on_bad_sample == "skip", budget=bad_sample_budget)
        self.buffers = Buffers()
        self.store: Store | None = None
        self.found: FoundStore | None = None
        self.asked: list[PromptBatch] | None = None
        self.resumed = 0  # batches that the run had finished when its checkpoint was written
        self.rows_in_memory: int | None = None
        self.order: dict[str, Any] = {}  # what the place in the data depends on
        self.saved_order: dict[str, Any] = {}

    @property
    def is_first(self) -> bool:
        """Whether this process says what all would say, also before a trainer is attached."""
        return rank_zero_only.rank == 0

    def setup(self, stage: str) -> None:
        if self.trainer is not None:
            device = self.trainer.strategy.root_device
            self.buffers = Buffers(pinned=pinned(device))
        if self.store is None and not (stage == "test" and not self.folder.exists()):
            self.store = self.opened()
            self.bad.samples = len(self.store)

    def opened(self) -> Store:
        """The store, if it is on the Hub at the commit that the first process found."""
        if self.address is None:
            return Store(self.folder, allow_missing=self.bad.skip)
        if self.trainer is not None:  # a branch may move on between the processes' questions
            first = self.on_hub().address if self.trainer.is_global_zero else None
            self.address = self.trainer.strategy.broadcast(first)
        return open_store(self.on_hub(), cache_gb=self.cache_gb, allow_missing=self.bad.skip)

    def on_hub(self) -> FoundStore:
        """The store on the Hub, asked for once."""
        if self.found is None:
            self.found = find_store(self.address)
            self.address, self.folder = self.found.address, self.found.folder
        return self.found

    def train_dataloader(self) -> ReadAhead:
        """Raises ``ValueError`` when the checkpoint's place is one in another order of the data."""
        samples, lengths = self.usable("train")
        limit = self.trainer.limit_train_batches
        self.order = {
            "seed": self.seed,
            "max_tokens": self.max_tokens,
            "world_size": self.trainer.world_size,
            "accumulate_grad_batches": self.trainer.accumulate_grad_batches,
            "block_shards": self.block_shards,
            "training samples": len(samples),
            "their hash": self.hash_of(samples),
            # None where nothing is limited, as in checkpoints that do not know these
            "limit_train_batches": None if repr(limit) == "1.0" else limit,
            "overfit_batches": self.trainer.overfit_batches or None,
        }
        refuse_other_order(self.saved_order, self.order)
        # Lightning cannot know that the sampler finds its place by counting.
        warnings.filterwarnings("ignore", ".*your dataloader is not resumable")
        sampler = PackSampler(
            samples,
            lengths,
            max_tokens=self.max_tokens,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
            done=self.batches_done,
            blocks=self.blocks(samples),
            limit=limit,
            repeat=self.trainer.overfit_batches > 0,
        )
        self.say_traffic("an epoch of training", sampler.epoch(0), blocks=True)
        return self.loader(sampler, self.cod)

    def blocks(self, samples: list[int]) -> list[int]:
        shards = [self.store.entries[i].shard for i in samples]
        return blocks_of(shards, size=self.block_shards, seed=self.seed)

    def needs(self, pack_: Pack) -> list[str]:
        """The shards of a pack, in its order."""
        return list(dict.fromkeys(self.store.entries[i].shard for i in pack_.samples))

    def say_traffic(self, what: str, packs: list[Pack], *, blocks: bool = False) -> None:
        """With what would lower it; for a validation ``block_shards`` means nothing."""
        if isinstance(self.store, HubStore) and self.trainer.is_global_zero:
            cache = self.store.cache
            size = (self.block_shards or len(cache.sizes)) if blocks else None
            print(traffic(what, map(self.needs, packs), cache, blocks=size), file=sys.stderr)

    def batches_done(self) -> int:
        """Batches that this rank has finished since the run began.

        Lightning asks for the loader before it restores its counters, hence the maximum.
        """
        return max(self.resumed, self.trainer.fit_loop.epoch_loop.batch_progress.total.processed)

    def val_dataloader(self) -> ReadAhead:
        """Every row of every conversation of the validation split, in a fixed order."""
        samples, lengths = self.usable("val")
        packs = fill_packs(samples, lengths, max_tokens=self.max_tokens, seed=None)
        # Equally many, since a rank that has fewer would leave the others waiting.
        packs = even_out(packs, self.trainer.world_size)
        self.say_traffic("a validation", [Pack(members, 0) for members in packs])
        mine = packs[self.trainer.global_rank :: self.trainer.world_size]
        return self.loader([Pack(members, 0) for members in mine], self.cod.keeping_all())

    def test_dataloader(self) -> DataLoader:
        """Prompts to decode; ranks share them, and one may have none."""
        batches = self.test_batches()
        # Lightning would end a rank that has none.
        empty = PromptBatch(batches[0].prompt_set, [])
        batches = batches + [empty] * (self.trainer.world_size - len(batches))
        mine = batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=None, collate_fn=lambda batch: batch)

    def test_batches(self) -> list[PromptBatch]:
        """All that ``test`` decodes, read once: ``fit`` asks before it begins."""
        if self.asked is None:
            self.asked = prompt_batches(self.evaluation, self.target, shown=self.is_first)
        return self.asked

    def loader(self, packs: PackSampler | list[Pack], cod: Cod) -> ReadAhead:
        data = PackedSequences(
            self.store,
            cod=cod,
            max_rows=self.segment_rows(),
            mask_token_id=self.mask_token_id,
            buffers=self.buffers,
        )
        threads = self.num_workers
        if isinstance(self.store, HubStore):
            packs = FetchAhead(packs, self.needs, self.store.cache, threads=threads, lag=threads)
        return ReadAhead(data.__getitem__, packs, threads=threads)

    def limit_rows(self, config: PEagleConfig, *, recompute: bool) -> None:
        """Learn how many rows of this drafter ``memory_gb`` holds; called once it is built.

        Raises:
            ValueError: when the memory budget cannot hold one segment.
        """
        if self.memory_gb is not None:
            self.rows_in_memory = rows_within(
                self.memory_gb,
                config,
                slots=self.max_tokens,
                rollout=self.cod.num_depths,
                mtp_share=self.cod.mtp_share(),
                element=2 if str(self.trainer.precision).startswith("bf16") else 4,
                recompute=recompute,
            )

    def segment_rows(self) -> int:
        """What ``max_rows`` and ``memory_gb`` both allow."""
        if self.memory_gb is None:
            return DEFAULT_ROWS if self.max_rows is None else self.max_rows
        assert self.rows_in_memory is not None, "limit_rows comes first"
        limits = (self.max_rows, self.rows_in_memory)
        return min(limit for limit in limits if limit is not None)

    def usable(self, split: str) -> tuple[list[int], list[int]]:
        """Samples of a split that fit, and their slots."""
        found = self.store.split(split)
        if not found:
            raise ValueError(
                f"{self.folder} has no {split} conversation: capture more prompts, or "
                f"{'raise' if split == 'val' else 'lower'} capture.val_share"
            )
        samples = [i for i in found if 1 <= self.slots(i) <= self.max_tokens]
        if not samples:
            raise ValueError(
                f"no {split} sample fits: max_tokens = {self.max_tokens} is smaller than each of "
                f"the {len(found)} conversations in {self.folder}"
            )
        if len(samples) < len(found) and self.is_first:
            print(
                f"{len(found) - len(samples)} of {len(found)} {split} conversations are longer "
                f"than max_tokens = {self.max_tokens} and are left out",
                file=sys.stderr,
            )
        return samples, [self.slots(i) for i in samples]

    def slots(self, index: int) -> int:
        return self.store.entries[index].tokens - 2

    def assistant_tokens(self) -> Tensor:
        """How often each token is the assistant's in the training split; [V]."""
        found = track("token counts", self.store.split("train"), shown=self.is_first)
        samples = self.readable(found)
        return token_counts(samples, self.store.manifest.vocab_size)

    def readable(self, indices: Iterable[int]) -> Iterator[Sample]:
        for index in indices:
            try:
                yield self.store.read(index)
            except BadSample as error:
                self.bad.admit(str(error))

    def on_before_batch_transfer(
        self, batch: Batch | PromptBatch, dataloader_idx: int
    ) -> Batch | PromptBatch:
        """Damage found by the reading threads is judged here, in the order of training."""
        if isinstance(batch, Batch):
            for problem in batch.bad:
                self.bad.admit(problem)
        return batch

    def transfer_batch_to_device(
        self, batch: Batch | PromptBatch, device: torch.device, dataloader_idx: int
    ) -> Batch | PromptBatch:
        if isinstance(batch, PromptBatch):  # texts; decoding places their ids
            return batch
        kept = {name: getattr(batch, name) for name in ON_CPU}
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(**kept)

    def hash_of(self, samples: list[int]) -> str:
        """Of what the order depends on: with blocks also in which shards the samples are."""
        entries = [self.store.entries[i] for i in samples]
        text = "".join(f"{entry.sample} {entry.tokens}\n" for entry in entries)
        if self.block_shards is not None:
            text += "".join(f"{entry.shard}\n" for entry in entries)
        return xxhash.xxh3_64_hexdigest(text.encode())

    def state_dict(self) -> dict[str, Any]:
        return {"order": self.order, "bad": list(self.bad.found)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.saved_order = state_dict["order"]
        self.bad.found = dict.fromkeys(state_dict["bad"])
