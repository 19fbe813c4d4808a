"""What a run notes about where it ran."""

import os
import shutil
import subprocess
from pathlib import Path

from peagle.card import provenance


def git(folder, *arguments):
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@y.z", *arguments]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def commit_of(project, package, monkeypatch):
    """What a package notes that lies in a folder of a project which has a commit."""
    (project / package).mkdir(parents=True)
    git(project, "init")
    git(project, "commit", "--allow-empty", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(project / package / "provenance.py"))
    return provenance.git_commit(), git(project, "rev-parse", "HEAD")


def test_a_checkout_notes_its_commit(tmp_path, monkeypatch):
    noted, head = commit_of(tmp_path, "peagle/card", monkeypatch)
    assert noted == head


def test_a_package_that_is_installed_inside_another_project_notes_no_commit(tmp_path, monkeypatch):
    inside = ".venv/lib/python3.11/site-packages/peagle/card"
    assert commit_of(tmp_path, inside, monkeypatch)[0] is None


def test_without_git_a_run_notes_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", str(Path(os.devnull)))
    assert shutil.which("git") is None
    assert provenance.git_commit() is None
    assert provenance.environment()["git_commit"] is None
