"""The process that sends the entries of a queue to the Hub, each in at most one commit.

``sender.py`` starts it. The client has no timeout and joins its upload threads at exit, so only the
end of a process ends a request that hangs. This process imports neither Lightning nor torch, and
ends by itself when its time is up or its parent is gone.
"""

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelInfo,
    get_session,
    get_token,
    set_client_factory,
)
from huggingface_hub.errors import (
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from peagle.publish.allowed_files import SECRET, WEIGHTS
from peagle.publish.queue import CHECKPOINTS, MAIN, Entry, remove_entry, waiting_entries
from peagle.store.errors import reason

RETRY_STATUSES = frozenset({404, 408, 409, 412, 425, 429})  # of the 4xx
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
TIME_IS_UP = 3  # exit code


class RefusedError(Exception):
    """The Hub knows this login and says no: asking again is pointless for every entry."""


class RejectedError(Exception):
    """This entry cannot be sent as it is; others may."""


class UnsentError(Exception):
    """The time is up."""


@dataclass(frozen=True)
class Destination:
    """Where publications go. ``revision`` is the branch that serves, None means main."""

    repo_id: str
    private: bool
    revision: str | None
    endpoint: str | None

    def __post_init__(self):
        for name in ("repo_id", "revision", "endpoint"):
            text = getattr(self, name) or ""
            if SECRET.search(text) or (get_token() or "\n") in text:
                raise ValueError(
                    f"{name} contains a token; tokens come only from HF_TOKEN or `hf auth login`"
                )
        if urlsplit(self.endpoint or "").username:
            raise ValueError("endpoint must not contain a login; use HF_TOKEN or `hf auth login`")
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as error:
            raise ValueError(f"repo_id is malformed: {error}") from error
        if self.repo_id.count("/") != 1:
            raise ValueError(f"repo_id must be written owner/name, got {self.repo_id!r}")
        if self.revision == CHECKPOINTS:
            raise ValueError(f"revision {CHECKPOINTS!r} is the branch of resumable checkpoints")

    def branch(self, channel: str) -> str:
        return CHECKPOINTS if channel == CHECKPOINTS else self.revision or MAIN


def send_queue(
    queue: Path, destination: Destination, *, deadline: float, report: Callable[[dict], None]
) -> None:
    """Send every entry, oldest first, until ``deadline`` (of ``time.monotonic``)."""
    api = HfApi(endpoint=destination.endpoint)
    tried: set[Path] = set()
    while waiting := [entry for entry in waiting_entries(queue) if entry.folder not in tried]:
        entry = waiting[0]
        tried.add(entry.folder)
        try:
            report(send_until(api, entry, destination, deadline))
        except FileNotFoundError:  # another process has sent and removed it
            continue
        except RejectedError as error:
            report({"problem": str(error)})
            continue
        except (RefusedError, UnsentError) as error:
            report({"problem": str(error), "refused": isinstance(error, RefusedError)})
            return
        remove_entry(entry)


def send_until(api: HfApi, entry: Entry, destination: Destination, deadline: float) -> dict:
    """Try until it is sent; what can pass by itself is waited for, the rest is raised."""
    title, pause = entry.title(), FIRST_PAUSE_S
    while True:
        try:
            return send(api, entry, destination, title)
        except Exception as error:  # the client raises whatever its transport raises
            if not (entry.folder / "entry.json").exists():
                raise FileNotFoundError(entry.folder) from error
            _raise_if_hopeless(error, f"step {entry.step} was rejected", destination)
            wait = max(pause, _retry_after(error))
            if time.monotonic() + wait >= deadline:
                late = f"the Hub did not take step {entry.step} in time: {_safe_reason(error)}"
                raise UnsentError(late) from error
            time.sleep(wait)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def send(api: HfApi, entry: Entry, destination: Destination, title: str) -> dict:
    """One commit and its tag, at most once however often this is called, by however many.

    The history is read at the very commit that becomes the parent: if this entry lands in between
    (an answer was lost, another process was faster), the Hub answers 412 to the second.
    """
    repo, branch = destination.repo_id, destination.branch(entry.channel)
    head = find_head(api, destination, branch)
    history = api.list_repo_commits(repo, revision=head)
    known = (commit.commit_id for commit in history if entry.is_in_commit(commit.title, title))
    oid = next(known, None)
    if oid is None:
        files = entry.files()
        stale = [
            name
            for name in api.list_repo_files(repo, revision=head)
            if name not in files and (WEIGHTS.fullmatch(name) or name.startswith("metrics/"))
        ]
        operations = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        if entry.channel == MAIN:  # a figure of other weights must not stay beside these
            operations += [CommitOperationDelete(name, is_folder=False) for name in stale]
        oid = api.create_commit(
            repo, operations, commit_message=title, revision=branch, parent_commit=head
        ).oid
    tag = set_tag(api, repo, f"step-{entry.step}", oid) if entry.channel == MAIN else None
    return {"title": title, "commit": oid, "branch": branch, "tag": tag, "step": entry.step}


def find_head(api: HfApi, destination: Destination, branch: str) -> str:
    """The branch's newest commit; what is missing, repository or branch, is made."""
    repo = destination.repo_id
    try:
        return _info(api, repo, branch).sha
    except RevisionNotFoundError:
        start = _info(api, repo, MAIN).sha
        if branch == CHECKPOINTS:  # the oldest commit: none of the drafter's files are in it
            start = api.list_repo_commits(repo, revision=start)[-1].commit_id
        api.create_branch(repo, branch=branch, revision=start, exist_ok=True)
    except RepositoryNotFoundError:
        api.create_repo(repo, private=destination.private, exist_ok=True)
        if branch != MAIN:
            return find_head(api, destination, branch)
    return _info(api, repo, branch).sha


def set_tag(api: HfApi, repo: str, tag: str, oid: str) -> str:
    """Tag a commit; a tag that names another commit stays, and this one's gets a suffix."""
    tags = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo).tags}
    if tags.get(tag, oid) != oid:
        tag = f"{tag}-{oid[:7]}"
    api.create_tag(repo, tag=tag, revision=oid, exist_ok=True)
    return tag


def access_problem(destination: Destination) -> str | None:
    """Why this login cannot publish, from two cheap requests; None if nothing speaks against it."""
    api, repo = HfApi(endpoint=destination.endpoint), destination.repo_id
    try:
        me = api.whoami()
        if me.get("auth", {}).get("accessToken", {}).get("role") == "read":
            return "the login may only read; publishing needs a token that may write"
        owners = {me["name"], *(org["name"] for org in me.get("orgs", []))}
        if repo.split("/")[0] not in owners:
            return f"{repo} belongs neither to {me['name']} nor to one of their organisations"
        if destination.private and _info(api, repo, None).private is False:
            return f"{repo} exists and is public, although private is true"
    except RepositoryNotFoundError:
        return None  # it will be made
    except Exception as error:  # a check must not be what fails
        status = _status(error)
        return _refusal(status, repo) if status in (401, 403) else _safe_reason(error)
    return None


def _raise_if_hopeless(error: Exception, rejected: str, destination: Destination) -> None:
    """Raise for what no waiting mends: a network error or a broken answer may pass."""
    status = _status(error)
    if status in (401, 403):
        raise RefusedError(_refusal(status, destination.repo_id)) from error
    if status is None:
        hopeless = isinstance(error, ValueError) and not isinstance(error, json.JSONDecodeError)
    else:
        hopeless = 400 <= status < 500 and status not in RETRY_STATUSES
    if hopeless:
        raise RejectedError(f"{rejected}: {_safe_reason(error)}") from error


def _refusal(status: int, repo: str) -> str:
    if status == 401:
        return "the Hub does not accept the login (401); log in again with `hf auth login`"
    return f"the login may not write to {repo} (403)"


def _info(api: HfApi, repo: str, revision: str | None) -> ModelInfo:
    """``repo_info`` alone replaces the client's timeout, by none, unless it is given one."""
    return api.repo_info(repo, revision=revision, timeout=get_session().timeout.read)


def _status(error: BaseException | None) -> int | None:
    while error is not None:
        status = getattr(getattr(error, "response", None), "status_code", None)
        if status is not None:
            return status
        error = error.__cause__
    return None


def _retry_after(error: Exception) -> float:
    headers = getattr(getattr(error, "response", None), "headers", {})
    value = headers.get("Retry-After", "")
    return float(value) if value.isdigit() else 0.0


def _safe_reason(error: Exception) -> str:
    return SECRET.sub("***", reason(error).replace(get_token() or "\n", "***"))[:200]


def _watch(parent: int, deadline: float) -> None:
    """End this process at the deadline, or when the trainer that started it is gone."""
    while time.monotonic() < deadline and os.getppid() == parent:
        time.sleep(0.1)
    os._exit(TIME_IS_UP)


def _use_timeouts(seconds: float) -> None:
    client = get_session()
    kind, hooks = type(client), client.event_hooks
    set_client_factory(lambda: kind(event_hooks=hooks, follow_redirects=True, timeout=seconds))


def main() -> None:
    """Read the task from the first argument, print one JSON line for each thing that happened."""
    task = json.loads(sys.argv[1])
    deadline = time.monotonic() + task["seconds"]
    threading.Thread(target=_watch, args=(task["parent"], deadline), daemon=True).start()
    _use_timeouts(min(60.0, max(1.0, task["seconds"] / 4)))
    destination = Destination(**task["destination"])

    def report(event: dict) -> None:
        print(json.dumps(event), flush=True)

    if task["queue"] is None:
        report({"problem": access_problem(destination)})
    else:
        send_queue(Path(task["queue"]), destination, deadline=deadline, report=report)
    os._exit(0)  # the client's threads would be waited for


if __name__ == "__main__":
    main()
