"""Fixtures: seeded tests, a store of random hidden states, a Hub, and an engine's stand-in.

They import what is slow to load themselves: the process of pytest-xdist that only shares the tests
out reads this file too, and before the others start.
"""

import gc
import os
import threading

import pytest
from stand_in import make_stand_in


def pytest_configure(config):
    """Without a GPU, Triton's interpreter runs its kernels. It must be asked for before Triton is
    loaded."""
    if config.option.markexpr != "gpu":
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_finish():
    """Every fit of Lightning collects garbage, which would look through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_server_is_left():
    """A server whose block was left by an error spins, and takes time from all later tests."""
    before = set(threading.enumerate())
    yield
    left = [thread.name for thread in set(threading.enumerate()) - before]
    assert not [name for name in left if "serve_forever" in name], left


@pytest.fixture
def without_type_checks(monkeypatch):
    """As users run the code: the checks of the tests refuse some values first, and take time."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture
def random_store(tmp_path):
    """A complete store of 24 random conversations of 10 to 40 tokens, in three shards."""
    from random_parts import write_random_store

    return write_random_store(tmp_path / "store", 24, per_shard=8)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes stand-ins whose processes can be told from all others."""

    def make(behaviour="", **found):
        made = make_stand_in(tmp_path, behaviour, **found)
        monkeypatch.setenv("PEAGLE_STAND_IN", made.python)
        return made

    return make


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback, and a login to it."""
    from hub_server import TOKEN, Hub

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    with Hub() as hub:
        yield hub


@pytest.fixture
def own_hub(hub, monkeypatch, tmp_path):
    """The Hub that the client in this process asks, with caches of its own."""
    from huggingface_hub import constants, hf_api

    from peagle.store import hub as hub_store

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf/hub"))
    monkeypatch.setattr(hub_store, "cache_root", lambda: tmp_path / "cache")
    return hub
