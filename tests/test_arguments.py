"""The command line before it is parsed: lists that replace, paths, the module path."""

import os
import sys

import pytest

from peagle.__main__ import search_working_directory_last
from peagle.arguments import (
    FOLDER,
    expand_home,
    folder_path,
    refuse_repeated_keys,
    refuse_tokens,
    replacing_lists,
)
from peagle.shipped_configs import shipped


def test_a_list_of_settings_that_is_given_again_is_emptied_first(tmp_path):
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("capture: {prompts: [{source: a, limit: 1}], layer_ids: [1]}\n")
    second.write_text("capture: {prompts: [{source: b}]}\n")
    once = ["--config", str(first), "--capture.layer_ids", "[2]"]
    assert replacing_lists(once) == once
    assert replacing_lists(["--config", str(first), f"--config={second}"]) == [
        *("--config", str(first), "--capture.prompts=[]", f"--config={second}")
    ]
    assert replacing_lists(["-c", str(first), "--capture.prompts", "[{source: b}]"]) == [
        *("-c", str(first), "--capture.prompts=[]", "--capture.prompts", "[{source: b}]")
    ]


def test_settings_added_to_a_list_keep_what_is_there(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("trainer: {callbacks: [{class_path: A}]}\n")
    added = ["--config", str(file), "--trainer.callbacks+=[{class_path: B}]"]
    assert replacing_lists(added) == added


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("model: {a: 1}\ndata: {a: 1}\nmodel: {b: 1}\n", 3, "model"),
        ("data:\n  max_tokens: 8\n  max_tokens: 9\n", 3, "max_tokens"),
        ("evaluation:\n  prompts:\n    - source: a\n      source: b\n", 4, "source"),
    ],
)
def test_a_key_that_a_file_gives_twice_is_refused(tmp_path, text, line, key):
    file = tmp_path / "a.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=f"line {line} of .*a.yaml gives {key} a second time"):
        refuse_repeated_keys(["fit", "--config", str(file)])


def test_no_shipped_configuration_gives_a_key_twice():
    refuse_repeated_keys([str(path) for path in shipped().values()])


def test_a_home_folder_is_written_out(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    given = ["fit", "--out=~/x", "--limit=3", "--config", "~/y"]
    assert expand_home(given) == ["fit", "--out=/home/me/x", "--limit=3", "--config", "/home/me/y"]
    assert folder_path("~/run") == "/home/me/run"


def test_a_file_in_place_of_a_folder_is_refused(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    for path in (file, file / "run"):
        with pytest.raises(ValueError, match="file is a file, and a folder is needed"):
            folder_path(str(path))
    assert folder_path("hf://datasets/me/store@main") == "hf://datasets/me/store@main"


def test_a_path_that_is_not_given_is_asked_for():
    with pytest.raises(ValueError, match="give a --config that has it"):
        FOLDER(None)


def test_the_working_directory_is_searched_last(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["", os.getcwd(), "/lib"])
    search_working_directory_last()
    assert sys.path == ["/lib", str(tmp_path)]


def test_a_configuration_that_is_not_utf_8_is_named(tmp_path):
    path = tmp_path / "latin.yaml"
    path.write_bytes("# é\nseed_everything: 0\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin\.yaml is not UTF-8 .*: save it as UTF-8"):
        refuse_tokens(["--config", str(path)])
