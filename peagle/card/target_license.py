"""The target's licence: read where its makers wrote it, or said to be unknown."""

import sys
from pathlib import Path

from huggingface_hub import ModelCard, get_session, hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from peagle.store.errors import reason


def license_of(name: str, path: str, revision: str | None) -> str | None:
    """What the front matter of the target's README names; None where it names nothing.

    What cannot be read is said in one line, and ends no training.
    """
    try:
        readme = _readme(name, path, revision)
        # The client complains about a page without front matter, which is no fault here.
        named = ModelCard(readme, ignore_metadata_errors=True).data if readme[:3] == "---" else {}
    except Exception as error:  # the client raises whatever its transport or a page brings
        why = f"not known ({reason(error)}); give RunRecord a `license`"
        print(f"licence of {name}: {why}", file=sys.stderr)
        return None
    license = named.get("license")
    if license == "other":
        license = named.get("license_name") or license
    return license if isinstance(license, str) else None


def _readme(name: str, path: str, revision: str | None) -> str:
    """The target's README at its own revision; "" where there is none.

    One request of ten seconds at most: a download by the client repeats one that hangs for more
    than a minute.
    """
    if Path(path).is_dir():
        readme = Path(path) / "README.md"
        return readme.read_text("utf-8") if readme.exists() else ""
    cached = try_to_load_from_cache(name, "README.md", revision=revision)
    if isinstance(cached, str):
        return Path(cached).read_text("utf-8")
    address = hf_hub_url(name, "README.md", revision=revision)
    answer = get_session().get(
        address, headers=build_hf_headers(), timeout=10, follow_redirects=True
    )
    if answer.status_code == 404:
        return ""
    hf_raise_for_status(answer)
    return answer.text
