"""Publications that wait on disk for the Hub.

    hub_spool/<time>-step-<N>-<channel>/
        entry.json    run_id, step, channel, final
        files/        exactly the files of the commit

An entry appears whole, by one rename, and never changes. ``peagle/publish/upload.py`` sends it.
"""

import contextlib
import hashlib
import json
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from peagle.card.markdown import without_folders
from peagle.card.run_files import sha256
from peagle.publish.allowed_files import PROVENANCE, refuse_secrets
from peagle.store.disk import sync

QUEUE, DRY_RUN = "hub_spool", "hub_dry_run"  # folders of a run
MAIN, CHECKPOINTS = "main", "ckpts"  # channels


@dataclass(frozen=True)
class Entry:
    """``final``: its figures may be renewed later; a save on the way is the same whenever made."""

    folder: Path
    run_id: str
    step: int
    channel: str
    final: bool

    def files(self) -> dict[str, Path]:
        """Path in the repository -> file, sorted."""
        top = self.folder / "files"
        paths = sorted(path for path in top.rglob("*") if path.is_file())
        return {path.relative_to(top).as_posix(): path for path in paths}

    def title(self) -> str:
        """What the history is searched for: the same for the same files, different otherwise."""
        hashes = {name: sha256(path) for name, path in self.files().items()}
        content = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
        weights = [
            value for name, value in hashes.items() if name.endswith((".safetensors", "ckpt"))
        ]
        if len(weights) != 1:  # a sharded drafter
            weights = [hashlib.sha256("".join(weights).encode()).hexdigest()]
        return f"{self.run_id} step {self.step} weights {weights[0][:12]} files {content[:12]}"

    def is_in_commit(self, commit_title: str, title: str) -> bool:
        """Whether the commit holds this entry, whose own title is ``title``.

        A run that was killed makes the saves since its last checkpoint again, with the same
        weights under a new date: they are on the Hub already.
        """
        if self.final:
            return commit_title == title
        end = " files " if self.channel == MAIN else " weights "
        return commit_title.startswith(title.partition(end)[0] + end)


def add_entry(
    queue: Path,
    files: dict[str, Path],
    *,
    run_id: str,
    step: int,
    channel: str,
    final: bool,
    transfer: Callable[[Path, Path], object],
) -> Entry:
    """Add an entry; ``transfer(source, path)`` brings each file there: a copy, a move or a link.

    What waits already with the same content is not added again: the waiting entry is returned.
    """
    refuse_secrets(files)
    with staging_folder(queue) as stage:
        for name, source in files.items():
            path = stage / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            transfer(source, path)
            if name == PROVENANCE or name.startswith("metrics/"):
                text = without_folders(path.read_text("utf-8"))
                path.unlink()  # it may be a link to the run's own
                path.write_text(text, "utf-8")
            sync(path)
        description = {"run_id": run_id, "step": step, "channel": channel, "final": final}
        (stage / "entry.json").write_text(json.dumps(description))
        sync(stage / "entry.json")
        staged = Entry(stage, **description)
        for waiting in waiting_entries(queue):
            with contextlib.suppress(FileNotFoundError):  # sent a moment ago
                if replace(waiting, folder=stage) == staged and waiting.title() == staged.title():
                    return waiting
        folder = queue / f"{time.time_ns()}-step-{step}-{channel}"
        stage.rename(folder)
    sync(queue)
    return Entry(folder, **description)


@contextlib.contextmanager
def staging_folder(queue: Path) -> Iterator[Path]:
    """A folder beside the entries, gone afterwards unless it was renamed into one."""
    folder = queue / f".stage-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def waiting_entries(queue: Path) -> list[Entry]:
    """Oldest first."""
    entries = []
    for file in sorted(queue.glob("[!.]*/entry.json")):
        with contextlib.suppress(FileNotFoundError):  # sent a moment ago
            entries.append(Entry(file.parent, **json.loads(file.read_text())))
    return entries


def remove_entry(entry: Entry) -> None:
    """Remove an entry at once, then its files."""
    gone = entry.folder.with_name(f".sent-{entry.folder.name}")
    with contextlib.suppress(FileNotFoundError):
        entry.folder.rename(gone)
    shutil.rmtree(gone, ignore_errors=True)


def remove_leftovers(queue: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for folder in [*queue.glob(".stage-*"), *queue.glob(".sent-*")]:
        shutil.rmtree(folder, ignore_errors=True)
