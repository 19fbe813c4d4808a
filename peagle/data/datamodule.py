"""Streams a store as packed sequences, each with the segments it is trained in.

order of an epoch = f(seed, epoch) -> packs of documents -> slots -> segments

Nothing random is stored: the order of an epoch and the seed of every COD draw follow from
(seed, epoch, pack), so a run resumes at any step by counting.
"""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from peagle.cod.rollouts import Cod, expected_rows
from peagle.cod.segments import partition
from peagle.data.batch import Batch, pack
from peagle.data.store import Store, token_counts
from peagle.evaluation import EvaluationConfig, PromptBatch, prompt_batches
from peagle.model.target import TargetSource

ON_CPU = ("document", "supervised")  # the draw is made on the CPU, the same on every device


class Pack(NamedTuple):
    """The samples of one packed sequence, and the seed of its COD draw."""

    samples: tuple[int, ...]
    seed: int


def plan_packs(
    samples: list[int], lengths: list[int], *, max_tokens: int, seed: int, epoch: int | None
) -> list[Pack]:
    """Fill sequences of at most ``max_tokens`` slots, in an order that the epoch decides.

    ``lengths`` are slots per sample. ``epoch=None`` keeps the given order (validation).
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + (epoch or 0))
    order = list(range(len(samples)))
    if epoch is not None:
        order = torch.randperm(len(samples), generator=generator).tolist()
    packs: list[list[int]] = []
    room = 0
    for i in order:
        if lengths[i] > room:
            packs.append([])
            room = max_tokens
        packs[-1].append(samples[i])
        room -= lengths[i]
    seeds = torch.randint(2**62, (len(packs),), generator=generator).tolist()
    return [Pack(tuple(members), s) for members, s in zip(packs, seeds, strict=True)]


class PackSampler(Sampler[Pack]):
    """The packs of one rank in one epoch, from any step on.

    Ranks take packs in turn; the few left over are dropped so that all ranks make equal steps.
    """

    def __init__(
        self,
        samples: list[int],
        lengths: list[int],
        *,
        max_tokens: int,
        seed: int,
        rank: int,
        world_size: int,
    ):
        self.samples, self.lengths = samples, lengths
        self.max_tokens, self.seed = max_tokens, seed
        self.rank, self.world_size = rank, world_size
        self.resume_at(epoch=0, step=0)

    def resume_at(self, *, epoch: int, step: int) -> None:
        """Continue epoch ``epoch`` after ``step`` of its batches."""
        self.epoch, self.start = epoch, step
        packs = plan_packs(
            self.samples,
            self.lengths,
            max_tokens=self.max_tokens,
            seed=self.seed,
            epoch=epoch,
        )
        even = len(packs) - len(packs) % self.world_size
        self.packs = packs[self.rank : even : self.world_size]
        if not self.packs:
            raise ValueError(
                f"{len(packs)} packed sequences are too few for {self.world_size} processes"
            )

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of each epoch; a resumed epoch keeps its place."""
        if epoch != self.epoch:
            self.resume_at(epoch=epoch, step=0)

    def __len__(self) -> int:
        return len(self.packs)

    def __iter__(self) -> Iterator[Pack]:
        return iter(self.packs[self.start :])


class PackedSequences(Dataset[Batch]):
    """Reads packs from a store and segments them."""

    def __init__(self, store: Store, *, cod: Cod, max_rows: int, mask_token_id: int):
        self.store, self.cod, self.max_rows = store, cod, max_rows
        self.mask_token_id = mask_token_id

    def __getitem__(self, pack_: Pack) -> Batch:
        """Raises ``ValueError`` naming the sample that holds the mask token or is corrupt."""
        samples = [self.store.read(i) for i in pack_.samples]
        for index, sample in zip(pack_.samples, samples, strict=True):
            if (sample.input_ids == self.mask_token_id).any():
                raise ValueError(
                    f"sample {self.store.entries[index].sample} contains the mask token "
                    f"{self.mask_token_id}: choose a token id that never occurs"
                )
        slots = pack(samples)
        expected = expected_rows(slots["supervised"], slots["document"], cod=self.cod)
        segments = partition(expected, max_rows=self.max_rows)
        return Batch(**slots, segments=segments, seed=pack_.seed)


class HiddenStatesDataModule(L.LightningDataModule):
    """Training and validation batches from a hidden-state store.

    Args:
        target: ``tiny`` (embedded), a folder or a Hub id; only ``test`` opens it.
        revision: of the Hub id.
        store: folder of the store (``peagle capture`` makes it, ``fit`` does so when missing).
        cod: the COD settings of the model; given once, linked by the command line.
        mask_token_id: id of the reserved mask token; linked from the model.
        evaluation: what ``test`` decodes.
        max_tokens: slots per packed sequence; longer conversations are left out, counted.
        max_rows: rows per segment; fewer rows need less memory, at some cost in speed.
        num_workers: processes that read ahead; 0 reads in the training process.
        seed: decides the order of every epoch and every COD draw.
    """

    def __init__(
        self,
        target: str,
        revision: str | None,
        store: str,
        cod: Cod,
        mask_token_id: int,
        evaluation: EvaluationConfig,
        max_tokens: int = 8192,
        max_rows: int = 8192,
        num_workers: int = 2,
        seed: int = 0,
    ):
        super().__init__()
        self.target, self.evaluation = TargetSource(target, revision), evaluation
        self.folder, self.cod, self.mask_token_id = Path(store), cod, mask_token_id
        self.max_tokens, self.max_rows = max_tokens, max_rows
        self.num_workers, self.seed = num_workers, seed
        self.store: Store | None = None

    def setup(self, stage: str) -> None:
        if self.store is None and not (stage == "test" and not self.folder.exists()):
            self.store = Store(self.folder)
            vocab_size = self.store.manifest.vocab_size
            if not 0 <= self.mask_token_id < vocab_size:
                raise ValueError(
                    f"mask_token_id must lie in 0..{vocab_size - 1}, got {self.mask_token_id}"
                )

    def train_dataloader(self) -> DataLoader:
        samples, lengths = self.usable("train")
        sampler = PackSampler(
            samples,
            lengths,
            max_tokens=self.max_tokens,
            seed=self.seed,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.completed
        sampler.resume_at(epoch=self.trainer.current_epoch, step=done)
        return self.loader(sampler, self.cod)

    def val_dataloader(self) -> DataLoader:
        """Every row of every conversation of the validation split, in a fixed order."""
        samples, lengths = self.usable("val")
        packs = plan_packs(samples, lengths, max_tokens=self.max_tokens, seed=self.seed, epoch=None)
        mine = packs[self.trainer.global_rank :: self.trainer.world_size]
        return self.loader(mine, self.cod.keeping_all())

    def test_dataloader(self) -> DataLoader:
        """Prompts to decode; ranks share them."""
        batches = prompt_batches(self.evaluation, self.target.tokenizer())
        mine = batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=None)

    def loader(self, packs: "PackSampler | list[Pack]", cod: Cod) -> DataLoader:
        dataset = PackedSequences(
            self.store, cod=cod, max_rows=self.max_rows, mask_token_id=self.mask_token_id
        )
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=packs,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def usable(self, split: str) -> tuple[list[int], list[int]]:
        """Samples of a split that fit, and their slots."""
        found = self.store.split(split)
        samples = [i for i in found if 1 <= self.slots(i) <= self.max_tokens]
        if not samples:
            raise ValueError(
                f"no {split} sample fits: max_tokens = {self.max_tokens} is smaller than each of "
                f"the {len(found)} conversations in {self.folder}"
            )
        if len(samples) < len(found):
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
        train = self.store.split("train")
        samples = (self.store.read(i) for i in tqdm(train, desc="token counts", disable=None))
        return token_counts(samples, self.store.manifest.vocab_size)

    def transfer_batch_to_device(
        self, batch: Batch | PromptBatch, device: torch.device, dataloader_idx: int
    ) -> Batch | PromptBatch:
        if isinstance(batch, PromptBatch):  # lists of ids; decoding places them
            return batch
        kept = {name: getattr(batch, name) for name in ON_CPU}
        moved = super().transfer_batch_to_device(batch, device, dataloader_idx)
        return moved._replace(**kept)
