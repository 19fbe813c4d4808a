"""``python -m peagle export``: the servable folder of a checkpoint."""

import sys
from pathlib import Path

from peagle.card.target_name import hub_name_of
from peagle.model.restore import refuse_other_target
from peagle.model.saved_drafter import load_drafter
from peagle.next_step import bench_command
from peagle.serve.contract import Layout
from peagle.serve.export import Verifier, export_drafter, refuse_foreign
from peagle.target.target import TargetSource


def export(
    ckpt_path: str,
    out: Path,
    format: Layout = "eagle3",
    target: str | None = None,
    revision: str | None = None,
    k: int | None = None,
) -> None:
    """Write the servable folder of a checkpoint.

    Args:
        ckpt_path: a ``.ckpt`` of ``fit``, or hf://OWNER/NAME/FILE@REVISION.
        out: folder to write; an earlier export is replaced, any other content is refused.
        format: ``eagle3`` for vLLM's --speculative-config, ``speculators`` for ``vllm serve DIR``.
        target: Hub id (or folder) of the target; the speculators format names it.
        revision: of the Hub id.
        k: drafts per round that the speculators format asks for; default the trained depth.
    """
    refuse_foreign(Path(out))  # before a checkpoint is fetched
    verifier, drafter = None, load_drafter(ckpt_path)
    if target is not None:
        source = TargetSource(target, revision)
        text = source.config()
        refuse_other_target(drafter.config, text)
        verifier = Verifier(verifier_name(source, format), text.architectures or [])
    export_drafter(drafter, Path(out), layout=format, verifier=verifier, k=k)
    print(f"wrote {out}; next:\n{bench_command(out, target or 'TARGET', revision)}")


def verifier_name(source: TargetSource, format: Layout) -> str:
    """Hub id of the target, as a card finds it; its folder where nothing tells it."""
    folder = Path(source.path)
    if not folder.is_dir():
        return source.name
    found = hub_name_of(folder)
    name = found.hub_id if found else str(folder.resolve())
    how = f"{name}, after {found.source}" if found else f"its folder on this machine, {name}"
    if format == "speculators":
        print(f"config.json names the target by {how}: give --target HUB_ID if it has another",
              file=sys.stderr)  # fmt: skip
    return name
