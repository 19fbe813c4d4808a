"""A target's folder tells its name on the Hub, or nobody guesses one."""

import json

import pytest

from peagle.card.target_name import hub_name_of


def folder_with(path, config=None, readme=None):
    path.mkdir(parents=True)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    if readme is not None:
        (path / "README.md").write_text(readme)
    return path


def test_a_snapshot_of_the_hubs_cache_is_known_for_certain(tmp_path):
    commit = "0123456789abcdef0123456789abcdef01234567"
    place = tmp_path / f"hub/models--Qwen--Qwen3-0.6B/snapshots/{commit}"
    found = hub_name_of(folder_with(place, {"_name_or_path": "other/model"}))
    assert found[:2] == ("Qwen/Qwen3-0.6B", commit)
    (tmp_path / "link").symlink_to(place)
    assert hub_name_of(tmp_path / "link") == found


@pytest.mark.parametrize(
    ("config", "readme", "expected"),
    [
        ({"_name_or_path": "Qwen/Qwen3-0.6B"}, None, "Qwen/Qwen3-0.6B"),
        ({"_name_or_path": "/home/someone/qwen"}, None, None),
        ({"_name_or_path": ""}, None, None),
        ({}, "---\nmodel-index:\n- name: a/b\n  results: []\n---\n", "a/b"),
        ({}, "---\nbase_model: Qwen/Qwen3-0.6B-Base\n---\n", None),  # what it was made from
        ({}, "---\nbase_model: [torn\n---\n", None),
        (None, None, None),
    ],
)
def test_the_folders_own_files_name_it_or_nothing_does(tmp_path, config, readme, expected):
    found = hub_name_of(folder_with(tmp_path / "target", config, readme))
    assert (found and found.hub_id) == expected


def test_a_name_that_is_no_folder_has_no_other_name(tmp_path):
    assert hub_name_of(tmp_path / "nowhere") is None
