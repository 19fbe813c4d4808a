"""Who and what a Hub knows, and how each of its requests is answered; no sockets here."""

import base64
import hashlib
import itertools
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import parse_qs

from hub_storage import Blob, RefusalError, Reply, Request, Storage

TOKEN = "hf_" + "loopback" * 4 + "aa"  # the length of a real one
READ_ONLY = "hf_" + "readonly" * 4 + "aa"
LFS_SUFFIXES = (".safetensors", ".parquet", ".ckpt", ".bin", ".pt", ".png")
PAGE = 20  # commits in one answer


@dataclass(frozen=True)
class User:
    name: str
    organizations: tuple[str, ...] = ()
    role: str = "write"


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    files: dict[str, Blob]


@dataclass
class Repo:
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def at(self, revision: str) -> Commit:
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise RefusalError(404, "RevisionNotFound")
        return self.commits[oid]

    def history(self, revision: str) -> list[Commit]:
        """Newest first."""
        commit, found = self.at(revision), []
        while commit is not None:
            found.append(commit)
            commit = self.commits[commit.parent] if commit.parent else None
        return found


class HubState:
    def __init__(self, *, part_size: int | None = None, xet: Path | None = None):
        self.storage = Storage(part_size, xet)
        self.users = {TOKEN: User("alice", ("team",)), READ_ONLY: User("alice", role="read")}
        self.repos: dict[str, Repo] = {}
        self.lock = threading.RLock()
        self.counter = itertools.count(1)

    def history(self, repo: str, revision: str = "main") -> list[Commit]:
        """The commits of a publisher, newest first: all but the one the Hub makes itself."""
        return self.repos[repo].history(revision)[:-1] if repo in self.repos else []

    def content(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        files = self.repos[repo].at(revision).files
        return {path: self.storage.blobs[blob.sha256] for path, blob in files.items()}

    def add_commit(self, repo: Repo, branch: str, title: str, message: str, files: dict) -> Commit:
        oid = hashlib.sha1(f"{next(self.counter)} {title}".encode()).hexdigest()
        commit = Commit(oid, repo.branches.get(branch), title, message, files)
        repo.commits[oid] = commit
        repo.branches[branch] = oid
        return commit

    def put(self, name: str, files: dict[str, bytes], *, branch: str = "main") -> str:
        """A commit that holds these files alone, in a private repository; returns its oid."""
        repo = self.repos.setdefault(name, Repo(private=True))
        blobs = {}
        for path, content in files.items():
            blob = self.storage.store(content)
            blobs[path] = Blob(blob.sha256, blob.size, path.endswith(LFS_SUFFIXES))
        return self.add_commit(repo, branch, "files", "", blobs).oid

    def readable(self, request: Request) -> Repo:
        repo = self.repos.get(request.args["repo"])
        if repo is None or (repo.private and not may_write(request.user, request.args["repo"])):
            raise RefusalError(404 if request.user else 401, "RepoNotFound")
        return repo

    def writable(self, request: Request) -> Repo:
        repo = self.readable(request)
        if not may_write(request.user, request.args["repo"]) or request.user.role == "read":
            raise RefusalError(403)
        return repo

    def unknown(self, request: Request) -> Reply:
        raise RefusalError(404)

    def whoami(self, request: Request) -> Reply:
        if request.user is None:
            raise RefusalError(401)
        user = request.user
        return Reply(
            {
                "type": "user",
                "name": user.name,
                "orgs": [{"name": name, "roleInOrg": "write"} for name in user.organizations],
                "auth": {"type": "access_token", "accessToken": {"role": user.role}},
            }
        )

    def create(self, request: Request) -> Reply:
        asked = request.json()
        name = f"{asked.get('organization') or request.user.name}/{asked['name']}"
        if asked.get("type") == "dataset":
            name = f"datasets/{name}"
        if not may_write(request.user, name) or request.user.role == "read":
            raise RefusalError(403)
        reply = {"url": f"{self.storage.url}/{name}", "name": name}
        if name in self.repos:
            return Reply(reply, 409)
        private = asked.get("private", asked.get("visibility") == "private")
        repo = self.repos[name] = Repo(bool(private))
        attributes = self.storage.store(b"*.safetensors filter=lfs\n")
        self.add_commit(repo, "main", "initial commit", "", {".gitattributes": attributes})
        return Reply(reply)

    def validate(self, request: Request) -> Reply:
        lines = request.json()["content"].splitlines()
        if not lines or lines[0] != "---":
            missing = {"message": "empty or missing yaml metadata in repo card"}
            return Reply({"errors": [], "warnings": [missing]})
        if "---" not in lines[1:]:
            return Reply({"errors": [{"message": "front matter has no end"}], "warnings": []}, 400)
        return Reply({"errors": [], "warnings": []})

    def preupload(self, request: Request) -> Reply:
        files = self.writable(request).at(request.args["rev"]).files
        answer = []
        for asked in request.json()["files"]:
            lfs = asked["path"].endswith(LFS_SUFFIXES)
            answer.append(
                {
                    "path": asked["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": False,
                    "oid": self.storage.etag(files[asked["path"]])
                    if asked["path"] in files
                    else None,
                }
            )
        return Reply({"files": answer})

    def commit(self, request: Request) -> Reply:
        repo, branch = self.writable(request), request.args["rev"]
        if branch not in repo.branches:
            raise RefusalError(404, "RevisionNotFound")
        operations = [json.loads(line) for line in request.body.splitlines()]
        header = operations[0]["value"]
        if header.get("parentCommit", repo.branches[branch]) != repo.branches[branch]:
            raise RefusalError(412)
        files = dict(repo.at(branch).files)
        for operation in operations[1:]:
            self.apply(files, operation["key"], operation["value"])
        commit = self.add_commit(
            repo, branch, header["summary"], header.get("description", ""), files
        )
        url = f"{self.storage.url}/{request.args['repo']}/commit/{commit.oid}"
        return Reply({"commitOid": commit.oid, "commitUrl": url})

    def apply(self, files: dict[str, Blob], kind: str, value: dict) -> None:
        path = value["path"]
        if kind == "file":
            files[path] = self.storage.store(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            if not self.storage.has(value["oid"]):
                raise RefusalError(400)  # a commit must not name content that never arrived
            files[path] = Blob(value["oid"], value["size"], True)
        elif kind == "deletedFile":
            if files.pop(path, None) is None:
                raise RefusalError(404, "EntryNotFound")
        else:
            assert kind == "deletedFolder", kind
            for inside in [name for name in files if name.startswith(path.rstrip("/") + "/")]:
                del files[inside]

    def tree(self, request: Request) -> Reply:
        files = self.readable(request).at(request.args["rev"]).files
        top = f"{request.args['path']}/" if request.args["path"] else ""
        recursive = request.query.get("recursive", ["false"])[0].lower() == "true"
        inside = {path: blob for path, blob in files.items() if path.startswith(top)}
        if top and not inside:
            raise RefusalError(404, "EntryNotFound")
        folders = {
            top + "/".join(parts[:depth])
            for parts in (path[len(top) :].split("/") for path in inside)
            for depth in range(1, len(parts) if recursive else min(2, len(parts)))
        }
        entries = [
            {"type": "directory", "path": path, "oid": "0" * 40, "size": 0} for path in folders
        ]
        for path, blob in inside.items():
            if recursive or "/" not in path[len(top) :]:
                entries.append(self.entry(path, blob))
        return Reply(sorted(entries, key=lambda entry: entry["path"]))

    def paths_info(self, request: Request) -> Reply:
        files = self.readable(request).at(request.args["rev"]).files
        text = request.body.decode()
        form = parse_qs(text) if "form" in request.headers["Content-Type"] else json.loads(text)
        return Reply([self.entry(path, files[path]) for path in form["paths"] if path in files])

    def refs(self, request: Request) -> Reply:
        repo = self.readable(request)
        listing = {
            kind: [
                {"name": name, "ref": f"refs/{prefix}/{name}", "targetCommit": oid}
                for name, oid in refs.items()
            ]
            for kind, prefix, refs in (
                ("branches", "heads", repo.branches),
                ("tags", "tags", repo.tags),
            )
        }
        return Reply({**listing, "converts": []})

    def commits(self, request: Request) -> Reply:
        history = self.readable(request).history(request.args["rev"])
        page = int(request.query.get("p", ["0"])[0])
        shown = history[page * PAGE : (page + 1) * PAGE]
        headers = {}
        if len(history) > (page + 1) * PAGE:
            name, revision = request.args["repo"], request.args["rev"]
            here = f"{self.storage.url}/api/models/{name}/commits/{revision}"
            headers["Link"] = f'<{here}?p={page + 1}>; rel="next"'
        date = "2026-01-01T00:00:00.000Z"
        listing = [
            {"id": c.oid, "title": c.title, "message": c.message, "authors": [], "date": date}
            for c in shown
        ]
        return Reply(listing, headers=headers)

    def tag(self, request: Request) -> Reply:
        repo, name = self.writable(request), request.json()["tag"]
        if name in repo.tags:
            raise RefusalError(409)
        repo.tags[name] = repo.at(request.args["rev"]).oid
        return Reply({})

    def branch(self, request: Request) -> Reply:
        repo, name = self.writable(request), request.args["rev"]
        if name in repo.branches:
            raise RefusalError(409)
        repo.branches[name] = repo.at(request.json().get("startingPoint", "main")).oid
        return Reply({})

    def info(self, request: Request) -> Reply:
        repo = self.readable(request)
        commit = repo.at(request.args["rev"] or "main")
        name = request.args["repo"]
        return Reply(
            {
                "id": name.removeprefix("datasets/"),
                "modelId": name,
                "sha": commit.oid,
                "private": repo.private,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": path} for path in commit.files],
            }
        )

    def resolve(self, request: Request) -> Reply:
        commit = self.readable(request).at(request.args["rev"])
        blob = commit.files.get(request.args["path"])
        if blob is None:
            raise RefusalError(404, "EntryNotFound")
        etag = self.storage.etag(blob)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(blob.size)}
        if blob.sha256 in self.storage.xet_hashes():
            address = (
                f"{self.storage.url}/api/models/{request.args['repo']}/xet-read-token/{commit.oid}"
            )
            headers["X-Xet-Hash"] = self.storage.xet_hashes()[blob.sha256]
            headers["Link"] = f'<{address}>; rel="xet-auth"'
        if request.method == "HEAD":
            return Reply(b"", headers=headers | {"Content-Length": str(blob.size)})
        content = self.storage.blobs[blob.sha256]
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range") or "")
        if asked is None:
            return Reply(content, headers=headers)
        first, last = int(asked[1]), int(asked[2] or len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Reply(content[first : last + 1], 206, headers)

    def entry(self, path: str, blob: Blob) -> dict:
        found = {
            "type": "file",
            "path": path,
            "size": blob.size,
            "oid": self.storage.etag(blob)[:40],
        }
        if blob.lfs:
            found["lfs"] = {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}
        if blob.sha256 in self.storage.xet_hashes():
            found["xetHash"] = self.storage.xet_hashes()[blob.sha256]
        return found


def may_write(user: User | None, repo: str) -> bool:
    owner = repo.removeprefix("datasets/").split("/")[0]
    return user is not None and owner in (user.name, *user.organizations)
