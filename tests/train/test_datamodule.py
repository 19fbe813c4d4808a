from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only
from random_parts import VOCABULARY, make_manifest, make_sample
from short_fits import make_data

from peagle.capture.prompts import PromptSource
from peagle.cod.sampling import Cod
from peagle.decode.evaluation import EvaluationConfig
from peagle.store.reader import Store
from peagle.store.writer import StoreWriter
from peagle.train.buffers import Buffers
from peagle.train.packed_sequences import PackedSequences
from peagle.train.prefetch import ReadAhead
from peagle.train.sampler import Pack


def reader(store, **changes):
    settings = {"cod": Cod(4, 0.8), "max_rows": 40, "mask_token_id": 1, "buffers": Buffers()}
    return PackedSequences(store, **{**settings, **changes})


def test_a_batch_holds_its_documents_and_covers_every_anchor_by_segments(random_store):
    store = Store(random_store)
    batch = reader(store)[Pack((0, 3, 1), seed=7)]
    assert len(batch.segments) > 1 and batch.seed == 7
    assert len(batch.tokens) == sum(store.entries[i].tokens - 2 for i in (0, 3, 1))
    covered = [a for s in batch.segments for a in range(s.start, s.stop)]
    assert covered == list(range(len(batch.tokens)))


def test_an_empty_pack_has_nothing_to_learn(random_store):
    batch = reader(Store(random_store))[Pack((), seed=7)]
    assert not batch.supervised.any() and len(batch.segments) == 1 and not batch.bad


@pytest.mark.parametrize("rank", range(5))
def test_a_rank_without_validation_or_prompts_of_its_own_gets_empty_batches(random_store, rank):
    data = make_data(random_store)
    data.evaluation = EvaluationConfig([PromptSource("stdlib", "test", limit=2)])
    data.trainer = SimpleNamespace(world_size=5, global_rank=rank)
    data.store = Store(random_store)
    assert 0 < len(data.store.split("val")) < 5
    supervised = sum(int(batch.supervised.sum()) > 0 for batch in data.val_dataloader())
    assert len(data.val_dataloader()) == 1 and supervised <= 1
    (prompts,) = data.test_dataloader()
    assert len(prompts.prompts) == (1 if rank < 2 else 0)


def test_one_rank_alone_says_what_all_would_say(random_store, monkeypatch, capsys):
    monkeypatch.setattr("peagle.progress.LINE_EVERY_S", 0.0)
    said = []
    for rank in (1, 0):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        data = make_data(random_store, max_tokens=20)
        data.setup("validate")
        data.test_batches()
        data.usable("train")
        said.append("".join(capsys.readouterr()))
    assert said[0] == ""
    assert "prompts: 40/40" in said[1] and "are longer than max_tokens = 20" in said[1]


def test_a_sample_with_the_mask_token_is_named(random_store):
    store = Store(random_store)
    token = int(store.read(3).input_ids[4])
    data = reader(store, mask_token_id=token)
    sample = store.entries[3].sample
    with pytest.raises(ValueError, match=f"sample {sample} contains the mask token {token}"):
        data[Pack((3,), seed=0)]


def test_reading_is_lazy_and_by_sample(tmp_path):
    writer = StoreWriter(tmp_path, shard_bytes=1)
    for number in range(3):
        writer.append(f"{number}", "train", make_sample(9, number))
    (tmp_path / "shard-00002.safetensors").write_bytes(b"broken")
    # The index is complete, so the store opens; only the broken sample fails, when it is read.
    make_manifest().write(tmp_path)
    store = Store(tmp_path)
    assert int(store.read(1).input_ids.max()) < VOCABULARY
    with pytest.raises(ValueError, match="shard-00002"):
        store.read(2)
    assert torch.equal(store.read(0).aux, make_sample(9, 0).aux)


PACKS = [Pack((n % 24, (5 * n + 3) % 24, (n + 11) % 24), seed=n) for n in range(40)]


def same(ours, theirs):
    return ours[7:] == theirs[7:] and all(map(torch.equal, ours[:7], theirs[:7]))


@pytest.mark.parametrize("threads", [0, 1, 2, 3])
def test_batches_are_the_same_however_many_threads_read_and_last_while_they_are_kept(
    random_store, threads
):
    store = Store(random_store)
    alone = [reader(store)[pack_] for pack_ in PACKS]  # each from memory of its own
    kept = list(ReadAhead(reader(store).__getitem__, PACKS, threads=threads))
    assert len(kept) == 40 and all(map(same, kept, alone))


def test_a_batch_that_is_gone_gives_its_memory_to_another(random_store):
    data = reader(Store(random_store))
    batches = ReadAhead(data.__getitem__, PACKS, threads=2)
    assert len({batch.aux.data_ptr() for batch in batches}) < 40
    assert 0 < len(data.buffers.free) <= 5


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned_and_arrive_whole(random_store):
    store = Store(random_store)
    alone = [reader(store)[pack_] for pack_ in PACKS]
    data = reader(store, buffers=Buffers(pinned=True))
    arrived = []
    for batch in ReadAhead(data.__getitem__, PACKS, threads=2):
        assert all(tensor.is_pinned() for tensor in batch[:7])
        arrived.append([tensor.to("cuda", non_blocking=True) for tensor in batch[:7]])
    for ours, theirs in zip(arrived, alone, strict=True):
        assert all(torch.equal(a.cpu(), b) for a, b in zip(ours, theirs, strict=False))


@pytest.mark.parametrize("setting", [{"max_tokens": 0}, {"max_rows": 0}, {"num_workers": -1}])
def test_sizes_that_hold_nothing_are_refused_before_anything_is_read(random_store, setting):
    with pytest.raises(ValueError, match=f"data.{next(iter(setting))} must"):
        make_data(random_store, **setting)
