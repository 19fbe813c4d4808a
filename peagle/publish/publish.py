"""``python -m peagle publish``: send a finished run, or what a fit could not send.

Nothing here needs Lightning.
"""

import csv
import json
import re
import shutil
import tempfile
import uuid
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard

from peagle.card.card import CardOptions, write_card
from peagle.card.run_files import read_json
from peagle.publish.allowed_files import PROVENANCE, check_card, files_to_publish
from peagle.publish.queue import DRY_RUN, MAIN, QUEUE, Entry, add_entry, waiting_entries
from peagle.publish.sender import PublishResult, Sender
from peagle.publish.upload import Destination

# run_id and step of a run whose provenance.json does not say them, and what its card names
NOTE = "hub.json"


def publish(
    run: Path,
    repo_id: str,
    private: bool = True,
    revision: str | None = None,
    endpoint: str | None = None,
    dry_run: bool = False,
    publish_timeout: float = 300.0,
) -> None:
    """Push a finished run to the Hub; the token comes from HF_TOKEN or ``hf auth login``.

    Args:
        run: folder of the run.
        repo_id: ``owner/name``.
        private: whether a repository that has to be made is private.
        revision: branch to publish on; default main.
        endpoint: address of another Hub.
        dry_run: write what would be sent to ``RUN/hub_dry_run`` and send nothing.
        publish_timeout: seconds to wait for the Hub.
    """
    run = Path(run)
    if not run.is_dir():
        raise ValueError(f"run folder {run} does not exist")
    destination = Destination(repo_id, private, revision, endpoint)
    name_repository_on_card(run, repo_id)
    result = publish_run(run, destination, dry_run=dry_run, publish_timeout=publish_timeout)
    for line in result.lines(repo_id):
        print(line)
    if not result.complete:
        raise ValueError(f"{result.problem or 'the Hub did not take everything'}; "
                         f"{len(result.waiting)} publications wait in {run / QUEUE}")  # fmt: skip


def name_repository_on_card(run_dir: Path, repo_id: str) -> None:
    """A card that was written before anybody knew where the drafter goes names its folder: let the
    serving lines name the repository. They follow when a later ``publish`` names another one."""
    readme = run_dir / "card/README.md"
    if not readme.is_file():
        return
    text = readme.read_text("utf-8")
    if named := read_json(run_dir / NOTE).get("named_on_card"):
        readme.write_text(re.sub(rf"(?<=[\"']){re.escape(named)}(?=[\"'])", repo_id, text), "utf-8")
        _write_note(run_dir, {"named_on_card": repo_id})
    if '"model": "./drafter"' not in text:
        return
    check_card(files_to_publish(run_dir), run_id_of(run_dir), trained_steps(run_dir))
    known = ModelCard.load(readme, ignore_metadata_errors=True).data
    options = CardOptions(
        base_model_relation=known.get("base_model_relation") or "adapter",
        license=known.get("license_name") or known.license,
        repo_id=repo_id,
        base_model=known.base_model,
    )
    write_card(run_dir, run_dir / "drafter", run_dir / "card", options=options)
    _write_note(run_dir, {"named_on_card": repo_id})


def publish_run(
    run_dir: Path, destination: Destination, *, dry_run: bool, publish_timeout: float
) -> PublishResult:
    """Push a finished run and whatever waits in its queue; what is there already stays as it is.

    Raises:
        ValueError: if the run holds nothing to publish.
    """
    if dry_run:
        shutil.rmtree(run_dir / DRY_RUN, ignore_errors=True)
        return describe_dry_run(enqueue_run(run_dir, run_dir / DRY_RUN), destination)
    queue = run_dir / QUEUE
    if (run_dir / "drafter").exists() or not waiting_entries(queue):
        enqueue_run(run_dir, queue)
    return Sender(queue, destination).send_all(publish_timeout)


def enqueue_run(run_dir: Path, queue: Path, *, step: int | None = None) -> Entry:
    """Copy the finished run into the queue, so that a later change of the folder cannot mix two."""
    files = files_to_publish(run_dir)
    note = {"run_id": run_id_of(run_dir), "step": trained_steps(run_dir, step)}
    check_card(files, **note)
    _write_note(run_dir, note)
    return add_entry(queue, files, **note, channel=MAIN, final=True, transfer=shutil.copyfile)


def copy_record(run_dir: Path, stage: Path, *, run_id: str, step: int) -> None:
    """Make ``stage`` a run folder of this step: with its curve, without totals of another step."""
    provenance = read_json(run_dir / PROVENANCE) | {"run_id": run_id, "step": step}
    if "training" in provenance:
        totals = {"steps": step, "tokens": None, "rows": None, "hours": None}
        provenance["training"] = provenance["training"] | totals
    (stage / PROVENANCE).write_text(json.dumps(provenance, indent=2))
    curve = run_dir / "metrics/train.csv"
    if curve.exists():
        (stage / "metrics").mkdir()
        shutil.copyfile(curve, stage / "metrics/train.csv")


def describe_dry_run(entry: Entry, destination: Destination) -> PublishResult:
    branch = destination.branch(entry.channel)
    planned = [f"commit to {destination.repo_id}@{branch}: {entry.title()}"]
    planned += [f"  {name} ({path.stat().st_size} bytes)" for name, path in entry.files().items()]
    if entry.channel == MAIN:
        planned.append(f"tag step-{entry.step}")
    return PublishResult(planned=(*planned, f"nothing was sent; the files are in {entry.folder}"))


def run_id_of(run_dir: Path) -> str:
    """The run's own name from provenance.json, or one that is made once and kept."""
    for name in (PROVENANCE, NOTE):
        if known := read_json(run_dir / name).get("run_id"):
            return str(known)
    made = uuid.uuid4().hex[:12]
    _write_note(run_dir, {"run_id": made})
    return made


def trained_steps(run_dir: Path, default: int | None = None) -> int:
    """How many steps the drafter in the folder has seen: what the run recorded comes first."""
    provenance = read_json(run_dir / PROVENANCE)
    recorded = (
        provenance.get("step")
        or (provenance.get("training") or {}).get("steps")
        or default
        or read_json(run_dir / NOTE).get("step")
        or _last_logged_step(run_dir / "metrics/train.csv")
    )
    try:
        return int(float(recorded))
    except (TypeError, ValueError):
        text = f"{run_dir / PROVENANCE} does not say after how many steps training ended"
        raise ValueError(text) from None


def _last_logged_step(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open() as file:
        steps = [row["step"] for row in csv.DictReader(file) if row.get("step")]
    return steps[-1] if steps else None


def _write_note(run_dir: Path, note: dict[str, Any]) -> None:
    """Add to what ``hub.json`` says."""
    note = read_json(run_dir / NOTE) | note
    # A name of its own: a run that ends and `peagle publish` may write at the same time.
    with tempfile.NamedTemporaryFile(
        "w", dir=run_dir, prefix=f".{NOTE}.", suffix=".tmp", delete=False
    ) as temporary:
        json.dump(note, temporary)
    Path(temporary.name).replace(run_dir / NOTE)
