"""``python -m peagle publish``: send a finished run, or what a fit could not send."""

from pathlib import Path

from huggingface_hub import ModelCard

from peagle.card.card import CardOptions, write_card
from peagle.publish.publish import publish_run, run_id, trained_steps
from peagle.publish.queue import check_card, collect


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
    if not Path(run).is_dir():
        raise ValueError(f"run folder {run} does not exist")
    name_on_card(Path(run), repo_id)
    result = publish_run(
        Path(run),
        repo_id,
        private=private,
        revision=revision,
        endpoint=endpoint,
        dry_run=dry_run,
        publish_timeout=publish_timeout,
    )
    for line in result.planned:
        print(line)
    for commit in result.sent:
        print(f"step {commit['step']} is on {repo_id}@{commit['branch']}")
    if not result.complete:
        raise ValueError(f"{result.problem or 'the Hub did not take everything'}; "
                         f"{len(result.waiting)} publications wait in the spool")  # fmt: skip


def name_on_card(run: Path, repo_id: str) -> None:
    """A card that was written before anybody knew where the drafter goes names its folder: let the
    serving lines name the repository."""
    readme = run / "card/README.md"
    if not readme.is_file() or '"model": "./drafter"' not in readme.read_text("utf-8"):
        return
    check_card(collect(run), run_id(run), trained_steps(run, None))
    known = ModelCard.load(readme, ignore_metadata_errors=True).data
    options = CardOptions(
        base_model_relation=known.get("base_model_relation") or "adapter",
        license=known.get("license_name") or known.license,
        repo_id=repo_id,
    )
    write_card(run, run / "drafter", run / "card", options=options)
