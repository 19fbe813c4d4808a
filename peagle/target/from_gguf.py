"""Make a target's folder of a GGUF file: ``python -m peagle.target.from_gguf FILE FOLDER``.

Commands read targets as safetensors beside a tokenizer, the form that vLLM serves; this writes it
once, in bf16. Weights that the file holds in fewer bits keep the values they were rounded to.
"""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import torch
from jsonargparse import auto_cli
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from peagle.store.disk import require_disk
from peagle.store.errors import reason

NEEDED_LIBRARIES = "reading GGUF needs two libraries: pip install 'peagle[gguf]'"


def make_folder(
    file: Path, folder: Path, *, sha256: str | None = None, hub_id: str | None = None
) -> None:
    """Write ``folder``: config, bf16 safetensors, tokenizer with template, README with licence.

    Nothing is left behind when it fails.

    Args:
        file: in the GGUF format.
        folder: where the target goes.
        sha256: what the file's hash must be.
        hub_id: the same model on the Hub, for cards and serving lines.

    Raises:
        ValueError: if the file is missing, damaged or another, transformers cannot read it, its
            tokenizer does not match its weights, ``folder`` is taken, or the disk is too small.
    """
    check(file, folder, sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        convert(file, unfinished)
        (unfinished / "README.md").write_text(front_matter(file, hub_id), "utf-8")
        unfinished.chmod(0o755)
        unfinished.rename(folder)
    except ImportError as error:
        raise ValueError(NEEDED_LIBRARIES) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    print(f"wrote {folder}: --target {folder}")


def check(file: Path, folder: Path, sha256: str | None) -> None:
    """What can be known before the weights are read."""
    if not file.is_file():
        raise ValueError(f"{file} does not exist")
    with open(file, "rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} is no GGUF file")
        opened.seek(0)
        found = hashlib.file_digest(opened, "sha256").hexdigest() if sha256 else None
    if found != sha256:
        raise ValueError(f"{file} is another file: its SHA-256 is {found}, expected {sha256}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists: give another folder, or remove it first")
    # Files hold 2 to 16 bits a weight; 4 is usual, and bf16 then four times as large.
    require_disk(folder, 4 * file.stat().st_size)


def convert(file: Path, folder: Path) -> None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            file.parent,
            gguf_file=file.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ValueError, KeyError, OSError, RuntimeError, IndexError) as error:
        raise ValueError(f"transformers cannot read {file} ({reason(error)})") from error
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ValueError(
            f"{file} does not fit together: its tokenizer has {len(tokenizer)} ids, its embedding "
            f"{rows} rows"
        )
    model.config.architectures = [type(model).__name__]
    vars(model.config).pop("_model_name_or_path", None)  # a title, which reads like a Hub id
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def front_matter(file: Path, hub_id: str | None) -> str:
    """Licence and origin where the file names them, as the Hub's model cards write them."""
    from gguf import GGUFReader

    named = GGUFReader(file).fields.get("general.license")
    fields = {"license": named and named.contents(), "model_name": hub_id}
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items() if value]
    return "\n".join(
        ["---", *lines, "---", "", f"Written by peagle from {file.name}, as bf16.", ""]
    )


if __name__ == "__main__":
    try:
        auto_cli(make_folder)
    except ValueError as error:
        raise SystemExit(f"peagle: {error}") from None
