"""Publications that wait on disk for the Hub, and which files of a run may be in one.

    hub_spool/<time>-step-<N>-<channel>/
        entry.json    run_id, step, channel, final
        files/        exactly the files of the commit

An entry appears whole, by one rename, and never changes. ``peagle/publish/upload.py`` sends it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token

from peagle.card.tables import public
from peagle.store.disk import sync

MAIN, CHECKPOINTS = "main", "ckpts"
PROVENANCE = "provenance.json"
DRAFTER_NAMES = frozenset(
    "config.json generation_config.json model.safetensors.index.json tokenizer.json "
    "tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "tokenizer.model chat_template.jinja".split()
)
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
CARD_FACTS = {  # rows of the card's tables
    "weights": re.compile(r"^\| Drafter weights, sha256 \| `([0-9a-f]{64})` \|", re.MULTILINE),
    "run": re.compile(r"^\| Run \| `([^`]+)` \|", re.MULTILINE),
    "steps": re.compile(r"^\| Steps \| ([\d,]+) \|", re.MULTILINE),
}
SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}")


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
        found = sorted(path for path in top.rglob("*") if path.is_file())
        return {path.relative_to(top).as_posix(): path for path in found}

    def title(self) -> str:
        """What the history is searched for: the same for the same files, different otherwise."""
        hashes = {name: _sha256(path) for name, path in self.files().items()}
        content = hashlib.sha256(json.dumps(hashes).encode()).hexdigest()
        weights = [
            value for name, value in hashes.items() if name.endswith((".safetensors", "ckpt"))
        ]
        if len(weights) != 1:  # a sharded drafter
            weights = [hashlib.sha256("".join(weights).encode()).hexdigest()]
        return f"{self.run_id} step {self.step} weights {weights[0][:12]} files {content[:12]}"

    def is_named(self, published: str, title: str) -> bool:
        """Whether a commit of that title holds this entry, whose own title is ``title``.

        A run that was killed makes the saves since its last checkpoint again, with the same
        weights under a new date: they are on the Hub already.
        """
        if self.final:
            return published == title
        end = " files " if self.channel == MAIN else " weights "
        return published.startswith(title.partition(end)[0] + end)


def collect(run_dir: Path) -> dict[str, Path]:
    """Path in the repository -> file of the run, by an explicit list of names and suffixes.

    Only regular files in real folders: a link could lead to anything.
    """
    found = {
        name: path
        for name, path in _regular_files(run_dir / "drafter")
        if name in DRAFTER_NAMES or WEIGHTS.fullmatch(name)
    }
    for name, path in _regular_files(run_dir / "card"):
        if name == "README.md" or (name.endswith(".png") and not name.startswith(".")):
            found[name] = path
    for name, path in _regular_files(run_dir / "metrics"):
        if name.endswith(".json") and not name.startswith("."):
            found[f"metrics/{name}"] = path
    found |= {name: path for name, path in _regular_files(run_dir.resolve()) if name == PROVENANCE}
    if "config.json" not in found or not any(WEIGHTS.fullmatch(name) for name in found):
        raise ValueError(f"{run_dir / 'drafter'} holds no config.json with model.safetensors")
    if "README.md" not in found:
        raise ValueError(f"{run_dir / 'card'} holds no README.md: a drafter goes out with its card")
    return found


def write_entry(
    spool: Path,
    files: dict[str, Path],
    *,
    run_id: str,
    step: int,
    channel: str,
    final: bool,
    place: Callable[[Path, Path], object],
) -> Entry:
    """Add an entry; ``place(source, path)`` puts each file there by a copy, a move or a link."""
    _refuse_secrets(files)
    with staging(spool) as stage:
        for name, source in files.items():
            path = stage / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            place(source, path)
            if name == PROVENANCE or name.startswith("metrics/"):
                _without_folders(path)
            sync(path)
        description = {"run_id": run_id, "step": step, "channel": channel, "final": final}
        (stage / "entry.json").write_text(json.dumps(description))
        sync(stage / "entry.json")
        folder = spool / f"{time.time_ns()}-step-{step}-{channel}"
        stage.rename(folder)
    sync(spool)
    return Entry(folder, **description)


def _without_folders(path: Path) -> None:
    """Cut paths out of what will be public, in a file of its own: ``path`` may be a link."""
    text = public(path.read_text("utf-8"))
    path.unlink()
    path.write_text(text, "utf-8")


@contextlib.contextmanager
def staging(spool: Path) -> Iterator[Path]:
    """A folder beside the entries, gone afterwards unless it was renamed into one."""
    folder = spool / f".stage-{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def pending(spool: Path) -> list[Entry]:
    """Oldest first."""
    entries = []
    for file in sorted(spool.glob("[!.]*/entry.json")):
        with contextlib.suppress(FileNotFoundError):  # sent a moment ago
            entries.append(Entry(file.parent, **json.loads(file.read_text())))
    return entries


def sweep(spool: Path) -> None:
    """Remove what a killed process left half written or half removed."""
    for folder in spool.glob(".*"):
        shutil.rmtree(folder, ignore_errors=True)


def _refuse_secrets(files: dict[str, Path]) -> None:
    token = get_token()
    for name, path in files.items():
        if name.endswith((".safetensors", ".ckpt", ".png")):
            continue
        text = path.read_text("utf-8", errors="replace")
        if (token and token in text) or re.search(r"hf_[A-Za-z0-9]{34}", text):
            raise ValueError(f"{path} contains a token: remove it, then publish again")


def check_card(files: dict[str, Path], run_id: str, step: int) -> None:
    """Refuse the card of other weights, steps or runs, as a killed or resumed run leaves one."""
    card = files["README.md"].read_text("utf-8")
    facts = {"run": run_id, "steps": str(step)}
    if "model.safetensors" in files:
        facts["weights"] = _sha256(files["model.safetensors"])
    for fact, value in facts.items():
        named = CARD_FACTS[fact].search(card)
        if named and named[1].replace(",", "") != value:
            raise ValueError(
                f"{files['README.md']} describes other {fact} than the run's ({named[1]}, not "
                f"{value}): export and test the drafter again, then publish"
            )


def _regular_files(folder: Path) -> list[tuple[str, Path]]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            (entry.name, Path(entry.path))
            for entry in entries
            if stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)
        )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
