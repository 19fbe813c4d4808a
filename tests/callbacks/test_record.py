"""What ``provenance.json`` says about the target."""

import json
import shutil
from types import SimpleNamespace

from peagle.callbacks.record import RunRecord, source_of, target_section
from peagle.card.target_name import HubName
from peagle.store.reader import Store
from peagle.target.target import TargetSource


def store():
    store = object.__new__(Store)
    store.manifest = SimpleNamespace(fingerprint="f" * 16)
    return store


def test_a_target_in_a_folder_is_recorded_with_its_folder_and_its_name_on_the_hub(tmp_path):
    shutil.copy(f"{TargetSource('tiny').path}/config.json", tmp_path)
    target = TargetSource(str(tmp_path))
    section = target_section(target, store(), "mit", HubName("a/b", "c" * 40, "its README"))
    assert section == {
        "name_or_path": str(tmp_path),
        "hub_id": "a/b",
        "hub_id_from": "its README",
        "revision": "c" * 40,
        "architecture": "LlamaForCausalLM",
        "license": "mit",
        "fingerprint": "f" * 16,
    }
    unnamed = target_section(target, store(), None, None)
    assert unnamed["hub_id"] is unnamed["hub_id_from"] is unnamed["revision"] is None


def test_the_callback_hands_the_given_name_to_the_card():
    assert RunRecord(base_model="a/b").options.base_model == "a/b"


def test_a_resumed_run_keeps_the_drafter_that_it_started_from(tmp_path, without_type_checks):
    first, fresh = {"drafter": "a"}, {"drafter": "b"}
    record = {"training": {"init_from": first}}
    (tmp_path / "provenance.json").write_text(json.dumps(record))
    for step, started_from, found in ((0, fresh, fresh), (9, None, first), (0, None, None)):
        trainer = SimpleNamespace(global_step=step, default_root_dir=str(tmp_path))
        assert source_of(trainer, SimpleNamespace(started_from=started_from)) == found
