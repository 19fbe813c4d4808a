"""Writing files so that a kill or a full disk costs only what was being written."""

import os
import shutil
from pathlib import Path


def rename_durably(temporary: Path, path: Path) -> None:
    """Make a finished temporary file visible under its name, on the disk by the return."""
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    rename_durably(temporary, path)


def existing(path: Path) -> Path:
    """The path, or the nearest of the folders above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def free_bytes(path: Path) -> int:
    """Of the disk that a path, which may not be there yet, is on."""
    return shutil.disk_usage(existing(path)).free


def require_writable(folder: Path) -> None:
    """Raise ``ValueError`` where nothing can be written into a folder that may not be there yet."""
    place = existing(folder)
    if not os.access(place, os.W_OK | os.X_OK):
        raise ValueError(f"{place} cannot be written into: give another folder, or permission")


def require_disk(folder: Path, needed: int) -> None:
    """Raise ``ValueError`` with need and have when the disk under ``folder`` is too small."""
    free = free_bytes(folder)
    if needed > free:
        raise ValueError(
            f"not enough disk at {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        )
