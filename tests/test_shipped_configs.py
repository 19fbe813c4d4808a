"""``peagle configs``, and what ``--config NAME`` reads."""

import sys
from pathlib import Path

import pytest
from paths import ROOT

from peagle.shipped_configs import config_file, copy_config, run, with_files


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """No checkout in sight."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_name_means_the_shipped_configuration_from_any_folder(capsys):
    found = with_files(["fit", "--config", "quickstart", "--config=paper", "--run_dir", "eagle3"])
    for path, name in ((found[2], "quickstart"), (found[3].removeprefix("--config="), "paper")):
        assert Path(path).read_text() == (ROOT / f"configs/{name}.yaml").read_text()
    assert found[4:] == ["--run_dir", "eagle3"]
    assert f"configuration: {found[2]}\n" in capsys.readouterr().err


def test_a_file_in_the_working_directory_wins_and_is_named(elsewhere, capsys):
    (elsewhere / "paper.yaml").write_text("target: own\n")
    assert config_file("paper") == "paper.yaml"
    assert capsys.readouterr().err == "configuration: paper.yaml\n"
    assert config_file("paper.yaml") == "paper.yaml"
    assert config_file("target: tiny") == "target: tiny"  # settings in place of a file


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ("qwen", "`python -m peagle configs` lists the names"),
        ("configs/paper.yaml", "the shipped one is --config paper"),
    ],
)
def test_a_file_that_is_not_there_is_refused_with_the_way_on(given, hint):
    with pytest.raises(ValueError, match=f"--config {given}: there is no such file; {hint}"):
        config_file(given)


def test_a_copy_is_the_shipped_file_and_overwrites_nothing(elsewhere, capsys):
    run(["copy", "paper"])
    assert capsys.readouterr().out == "wrote paper.yaml\n"
    shipped = (ROOT / "configs/paper.yaml").read_text()
    assert (elsewhere / "paper.yaml").read_text() == shipped
    (elsewhere / "paper.yaml").write_text("mine")
    with pytest.raises(ValueError, match=r"paper\.yaml exists and is left as it is"):
        run(["copy", "paper", str(elsewhere)])
    assert (elsewhere / "paper.yaml").read_text() == "mine"
    assert copy_config("paper", elsewhere / "other.yaml").read_text() == shipped


def test_a_copy_of_nothing_or_into_nowhere_is_refused(elsewhere):
    with pytest.raises(ValueError, match="no configuration is called 'pap': there are eagle3, "):
        copy_config("pap", None)
    with pytest.raises(ValueError, match="is no folder: make it first"):
        copy_config("paper", elsewhere / "nowhere/paper.yaml")


def test_the_list_needs_nothing_heavy(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peagle", "configs"])
    from peagle.__main__ import main

    monkeypatch.setitem(sys.modules, "peagle.cli", None)  # an import of it would fail
    main()
    assert "K 7   tiny" in capsys.readouterr().out
