"""One packed sequence: its samples read from the store, side by side, and cut into segments."""

from contextlib import suppress

from jaxtyping import Int
from torch import Tensor

from peagle.cod.sampling import Cod, expected_rows
from peagle.cod.segments import partition
from peagle.progress import track
from peagle.store.errors import BadSample
from peagle.store.reader import Store
from peagle.train.buffers import Buffers
from peagle.train.packing import Batch, StatesInPlace, pack, unsupervised
from peagle.train.sampler import Pack


class PackedSequences:
    """Reads packs from a store and segments them."""

    def __init__(
        self,
        store: Store,
        *,
        cod: Cod,
        max_rows: int,
        mask_token_id: int | None,
        buffers: Buffers,
    ):
        self.store, self.cod, self.max_rows = store, cod, max_rows
        self.mask_token_id, self.buffers = mask_token_id, buffers

    def __getitem__(self, pack_: Pack) -> Batch:
        """What is wrong with a sample travels in ``bad``; nothing is trained in its place.

        Raises:
            ValueError: naming the sample that holds the mask token.
        """
        slots = sum(self.store.entries[i].tokens - 2 for i in pack_.samples)
        states = StatesInPlace(slots, self.store.manifest, self.buffers)
        samples, bad = [], []
        for index in pack_.samples:
            try:
                samples.append(states.read(self.store, index))
            except BadSample as error:
                bad.append(str(error))
            else:
                refuse_mask_token(self.store, index, samples[-1].input_ids, self.mask_token_id)
        packed = pack(samples or [unsupervised(self.store.manifest)])
        expected = expected_rows(packed["supervised"], packed["document"], cod=self.cod)
        segments = partition(expected, max_rows=self.max_rows)
        if self.buffers.pinned:
            packed = {name: tensor.pin_memory() for name, tensor in packed.items()}
        return Batch(**packed, segments=segments, seed=pack_.seed, bad=tuple(bad))


def refuse_mask_tokens(store: Store, mask_token_id: int | None) -> None:
    """Look through a whole store, without its states; damaged samples are left to training."""
    if mask_token_id is None:
        return
    for index in track("mask token", range(len(store))):
        with suppress(BadSample):
            refuse_mask_token(store, index, store.token_ids(index), mask_token_id)


def refuse_mask_token(
    store: Store, index: int, ids: Int[Tensor, " n"], mask_token_id: int | None
) -> None:
    """Raise ``ValueError`` for a sample that holds the token."""
    if mask_token_id is not None and (ids == mask_token_id).any():
        raise ValueError(
            f"sample {store.entries[index].sample} contains the mask token {mask_token_id}: choose "
            "a token id that never occurs, or take its prompt out and capture into another --store"
        )
