"""Which files of a run may be published; secrets and stale cards are refused."""

import re
import stat
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from huggingface_hub import get_token

from peagle.card.run_files import of_other_weights, read_json, sha256

PROVENANCE = "provenance.json"
DRAFTER_NAMES = frozenset(
    "config.json generation_config.json model.safetensors.index.json tokenizer.json "
    "tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt "
    "tokenizer.model chat_template.jinja".split()
)
WEIGHTS = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
CARD_ROWS = {  # of the card's tables
    "weights": re.compile(r"^\| Drafter weights, sha256 \| `([0-9a-f]{64})` \|", re.MULTILINE),
    "run": re.compile(r"^\| Run \| `([^`]+)` \|", re.MULTILINE),
    "steps": re.compile(r"^\| Steps \| ([\d,]+) \|", re.MULTILINE),
}
SECRET = re.compile(r"hf_[A-Za-z0-9]{16,}")


def files_to_publish(run_dir: Path) -> dict[str, Path]:
    """Path in the repository -> file of the run.

    Only regular files in real folders: a link could lead to anything.

    Raises:
        ValueError: if the run has no drafter or no card.
    """
    files = {
        name: path
        for name, path in _regular_files(run_dir / "drafter")
        if name in DRAFTER_NAMES or WEIGHTS.fullmatch(name)
    }
    for name, path in _regular_files(run_dir / "card"):
        if name == "README.md" or (name.endswith(".png") and not name.startswith(".")):
            files[name] = path
    weights = sha256(files["model.safetensors"]) if "model.safetensors" in files else None
    for name, path in _regular_files(run_dir / "metrics"):
        if name.endswith(".json") and not name.startswith("."):
            record: dict[str, Any] = {}
            with suppress(ValueError):  # what is no metrics file is judged as any other
                record = read_json(path).get("provenance") or {}
            if of_other_weights(record, weights):
                print(f"{path} is left out: its figures are of other weights", file=sys.stderr)
            else:
                files[f"metrics/{name}"] = path
    files |= {name: path for name, path in _regular_files(run_dir.resolve()) if name == PROVENANCE}
    if "config.json" not in files or not any(WEIGHTS.fullmatch(name) for name in files):
        raise ValueError(f"{run_dir / 'drafter'} holds no config.json with model.safetensors")
    if "README.md" not in files:
        raise ValueError(f"{run_dir / 'card'} holds no README.md: a drafter goes out with its card")
    return files


def check_card(files: dict[str, Path], run_id: str, step: int) -> None:
    """Refuse the card of other weights, steps or runs, as a killed or resumed run leaves one."""
    card = files["README.md"].read_text("utf-8")
    expected = {"run": run_id, "steps": str(step)}
    if "model.safetensors" in files:
        expected["weights"] = sha256(files["model.safetensors"])
    for row, value in expected.items():
        named = CARD_ROWS[row].search(card)
        if named and named[1].replace(",", "") != value:
            raise ValueError(
                f"{files['README.md']} describes other {row} than the run's ({named[1]}, not "
                f"{value}): export and test the drafter again, then publish"
            )


def refuse_secrets(files: dict[str, Path]) -> None:
    """Raise ``ValueError`` for a text file that holds a Hub token."""
    token = get_token()
    for name, path in files.items():
        if name.endswith((".safetensors", ".ckpt", ".png")):
            continue
        text = path.read_text("utf-8", errors="replace")
        if (token and token in text) or re.search(r"hf_[A-Za-z0-9]{34}", text):
            raise ValueError(f"{path} contains a token: remove it, then publish again")


def _regular_files(folder: Path) -> list[tuple[str, Path]]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    return sorted(
        (path.name, path) for path in folder.iterdir() if stat.S_ISREG(path.lstat().st_mode)
    )
