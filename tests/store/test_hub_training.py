"""Training from the Hub is training from the folder, to the bit; whatever goes wrong is said."""

from functools import cache

import lightning as L
import pytest
import torch
from hub_stores import ADDRESS, fetched, put_store, shards_of
from random_parts import write_random_store
from short_fits import Losses, make_data, make_module, make_trainer

from peagle.callbacks.checkpoint import Checkpoint
from peagle.model.saved_drafter import load_drafter
from peagle.store import hub as hub_store
from peagle.store import hub_files
from peagle.store.reader import Store
from peagle.store.shard_cache import FetchError

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.usefixtures("without_type_checks"),  # fits as those of test_module.py, but longer
]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """48 conversations in twelve shards, those of the validation split among all."""
    return write_random_store(tmp_path_factory.mktemp("made"), 48, per_shard=4)


@pytest.fixture(scope="module")
def trained_locally(store, tmp_path_factory):
    """Losses and drafter of a run from the folder; asked for again, it is not trained again."""

    @cache
    def run(steps, blocks=None):
        return train(tmp_path_factory.mktemp("local"), store, steps, block_shards=blocks)[:2]

    return run


def gigabytes(store, shards):
    """A cache that holds so many of the largest shard."""
    return shards * max(shards_of(store).values()) / 1e9 + 1e-9


def train(folder, place, steps, *, ckpt_path=None, seed=3, callbacks=(), **changes):
    """Losses of the steps, and the drafter in the end."""
    L.seed_everything(seed, verbose=False)
    losses, module = Losses(), make_module(num_layers=1)
    options = {"limit_val_batches": 1.0, "check_val_every_n_epoch": 1}
    callbacks = [losses, Checkpoint(every_n_steps=7), *callbacks]
    trainer = make_trainer(folder, steps, callbacks=callbacks, **options)
    data = make_data(place, num_workers=2, **changes)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    return losses.values, module.drafter.state_dict(), data


def equal(ours, theirs):
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


@pytest.mark.parametrize(("shards", "blocks"), [(2, None), (5, 3), (12, None)])
def test_a_fit_from_the_hub_is_the_one_from_the_folder_to_the_bit(
    own_hub, store, trained_locally, tmp_path, blocks, shards, capsys
):
    put_store(own_hub, store)
    ours, weights = trained_locally(30, blocks)
    changes = {"block_shards": blocks, "cache_gb": gigabytes(store, shards)}
    theirs, others, data = train(tmp_path / "hub", ADDRESS, 30, **changes)
    assert len(data.train_dataloader()) < 30 and theirs == ours and len(ours) == 30
    assert equal(weights, others)
    held = data.store.cache.used_bytes()
    assert 0 < held <= data.store.cache.limit
    assert set(fetched(own_hub)) == set(shards_of(store))
    if shards == 12:
        assert len(fetched(own_hub)) == 12
    said = capsys.readouterr().err
    assert said.count(f"store {data.address}\n") == 1
    assert "an epoch of training fetches about" in said and "a validation fetches" in said
    lines = {line.split(" fetches")[0]: line for line in said.splitlines() if " fetches" in line}
    assert "block_shards" not in lines["a validation"]
    if (shards, blocks) == (2, None):
        assert "or with data.block_shards 1, it is less" in lines["an epoch of training"]


@pytest.mark.parametrize(("first", "second"), [("hub", "folder"), ("folder", "hub")])
def test_a_run_may_go_on_where_the_store_lies_elsewhere(
    own_hub, store, trained_locally, tmp_path, first, second
):
    put_store(own_hub, store)
    places = {"hub": ADDRESS, "folder": store}
    whole, weights = trained_locally(24)
    begin, _, _ = train(tmp_path / "run", places[first], 24, callbacks=[StopAfter(10)])
    last = str(tmp_path / "run/checkpoints/last.ckpt")
    rest, others, _ = train(tmp_path / "run", places[second], 24, ckpt_path=last)
    assert begin + rest == whole and len(begin) == 10
    assert equal(weights, others)


class StopAfter(L.Callback):
    """Ends a run in the middle of an epoch."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or trainer.global_step >= self.step


def test_blocks_fetch_each_shard_once_an_epoch_where_all_at_once_fetch_more(
    own_hub, store, tmp_path
):
    put_store(own_hub, store)
    counts = {}
    for blocks in (None, 3):
        own_hub.requests.clear()
        folder = tmp_path / str(blocks)
        trainer = make_trainer(folder, -1, max_epochs=1)
        small = {"cache_gb": gigabytes(store, 7), "block_shards": blocks, "num_workers": 1}
        data = make_data(ADDRESS, **small)
        trainer.fit(make_module(num_layers=1), datamodule=data)
        counts[blocks] = len(fetched(own_hub))
        for shard in shards_of(store):
            data.store.cache.drop(shard)
    assert counts[3] == 12 < counts[None]


def test_an_order_by_blocks_is_part_of_what_a_checkpoint_stands_for(store, tmp_path):
    train(tmp_path, store, 5, block_shards=3)
    last = str(tmp_path / "checkpoints/last.ckpt")
    for other in (None, 4):
        with pytest.raises(ValueError, match=f"block_shards: checkpoint 3, this run {other}"):
            train(tmp_path, store, 9, block_shards=other, ckpt_path=last)
    train(tmp_path / "all", store, 5)
    content = torch.load(tmp_path / "all/checkpoints/last.ckpt", weights_only=True)
    del content["HiddenStatesDataModule"]["order"]["block_shards"]  # of an earlier version
    torch.save(content, tmp_path / "old.ckpt")
    old = str(tmp_path / "old.ckpt")
    with pytest.raises(ValueError, match="block_shards: checkpoint None, this run 3"):
        train(tmp_path, store, 9, block_shards=3, ckpt_path=old)
    assert len(train(tmp_path, store, 9, ckpt_path=old)[0]) == 4


def test_a_shard_that_stays_away_ends_the_run_with_its_checkpoint(
    own_hub, store, tmp_path, monkeypatch
):
    """Also where damaged samples may be left out: a network that is down is no damage."""
    monkeypatch.setattr(hub_files, "WAITS", (0.01,))
    put_store(own_hub, store)
    small = {"cache_gb": gigabytes(store, 3), "on_bad_sample": "skip", "bad_sample_budget": 1.0}

    class Outage(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if trainer.global_step == 4:
                own_hub.fault("resolve", status=503, where="^GET")

    with pytest.raises(FetchError, match=r"^shard-\d+\.safetensors of hf://.*/tiny@.*503 Serv"):
        train(tmp_path, ADDRESS, 14, callbacks=[Outage()], **small)
    own_hub.faults.clear()
    last = tmp_path / "checkpoints/last.ckpt"
    done = torch.load(last, weights_only=True)["global_step"]
    assert done >= 4 and load_drafter(last)
    rest, weights, data = train(tmp_path, ADDRESS, 14, ckpt_path=str(last), **small)
    assert len(rest) == 14 - done and not data.bad.found
    assert equal(weights, train(tmp_path / "folder", store, 14)[1])


def test_only_the_first_process_asks_what_a_branch_is(own_hub, store, tmp_path, monkeypatch):
    """Another process may ask when the branch has moved on."""
    commit = put_store(own_hub, store)
    own_hub.put("datasets/alice/states", {"tiny/manifest.json": b"{}"})
    told = hub_store.store_address(ADDRESS)._replace(revision=commit)
    data = make_data(ADDRESS)
    trainer = make_trainer(tmp_path, 1)
    data.trainer = trainer
    monkeypatch.setattr(type(trainer), "is_global_zero", False)
    asked = []
    monkeypatch.setattr(trainer.strategy, "broadcast", lambda x: asked.append(x) or told)
    data.setup("fit")
    assert asked == [None] and data.store.address == told
    assert data.store.entries == Store(store).entries
