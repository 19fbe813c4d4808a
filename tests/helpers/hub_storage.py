"""Where the loopback Hub keeps file contents: plain, LFS (whole or in parts), or beside it in xet.

With ``xet`` set, the client keeps its chunks in that folder (``casUrl: local://``) and the Hub only
learns which xet hash belongs to which sha256, from the shards that the client leaves there.
"""

import hashlib
import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

RECORD = 48  # bytes of a shard's header, and of every record that follows
WITH_VERIFICATION, WITH_SHA256 = 1 << 31, 1 << 30


@dataclass(frozen=True)
class Blob:
    sha256: str
    size: int
    lfs: bool


class RefusalError(Exception):
    def __init__(self, status: int, code: str = ""):
        super().__init__(code)
        self.status, self.code = status, code


@dataclass
class Reply:
    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Request:
    """One request after routing: ``args`` are the named parts of its path."""

    method: str
    user: Any  # hub_state.User, or None without a token
    args: dict[str, str | None]
    query: dict[str, list[str]]
    headers: Any
    body: bytes

    def json(self) -> dict:
        return json.loads(self.body or b"{}")


class Storage:
    def __init__(self, part_size: int | None, xet: Path | None):
        self.url = ""
        self.part_size, self.xet = part_size, xet
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[tuple[str, str], bytes] = {}

    def store(self, content: bytes) -> Blob:
        sha = hashlib.sha256(content).hexdigest()
        self.blobs[sha] = content
        return Blob(sha, len(content), False)

    def batch(self, request: Request) -> Reply:
        objects = []
        for asked in request.json()["objects"]:
            oid, size = asked["oid"], asked["size"]
            answer = {"oid": oid, "size": size}
            if oid not in self.blobs:
                base = f"{self.url}/lfs/{oid}"
                upload = {"href": base}
                if self.part_size is not None:
                    pieces = range(1, math.ceil(size / self.part_size) + 1)
                    header = {str(piece): f"{base}/{piece}" for piece in pieces}
                    header["chunk_size"] = str(self.part_size)
                    upload = {"href": f"{base}/complete", "header": header}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{base}/verify"}}
            objects.append(answer)
        transfer = "basic" if self.part_size is None else "multipart"
        return Reply({"transfer": transfer, "objects": objects})

    def upload(self, request: Request) -> Reply:
        oid, part = request.args["oid"], request.args["part"]
        digest = hashlib.sha256(request.body).hexdigest()
        if part is not None:
            self.parts[oid, part] = request.body
        elif digest != oid:
            raise RefusalError(400)
        else:
            self.blobs[oid] = request.body
        return Reply(b"", headers={"ETag": digest})

    def complete(self, request: Request) -> Reply:
        oid = request.args["oid"]
        pieces = [self.parts[oid, str(part["partNumber"])] for part in request.json()["parts"]]
        content = b"".join(pieces)
        if hashlib.sha256(content).hexdigest() != oid:
            raise RefusalError(400)
        self.blobs[oid] = content
        return Reply({})

    def verify(self, request: Request) -> Reply:
        content = self.blobs.get(request.args["oid"])
        if content is None or len(content) != request.json()["size"]:
            raise RefusalError(404)
        return Reply({})

    def xet_token(self, request: Request) -> Reply:
        url, token, expiry = f"local://{self.xet}", "loopback", 4102444800
        return Reply(
            {"casUrl": url, "accessToken": token, "exp": expiry},
            headers={
                "X-Xet-Cas-Url": url,
                "X-Xet-Access-Token": token,
                "X-Xet-Token-Expiration": str(expiry),
            },
        )

    def etag(self, blob: Blob) -> str:
        """What the client compares to find out that a file has not changed."""
        if blob.lfs:
            return blob.sha256
        content = self.blobs[blob.sha256]
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def has(self, sha256: str) -> bool:
        return sha256 in self.blobs or sha256 in self.xet_hashes()

    def xet_hashes(self) -> dict[str, str]:
        return hashes_by_sha256(self.xet) if self.xet is not None else {}


def hashes_by_sha256(folder: Path) -> dict[str, str]:
    """Read every shard in the folder.

    After the header, each file is a head, ``entries`` segments, as many verifications and a record
    with its sha256; a head of all ones ends the list. A hash is four little-endian words.
    """
    found = {}
    for shard in sorted(folder.rglob("*.mdb")):
        content = shard.read_bytes()
        position = RECORD
        while content[position : position + 32] not in (b"\xff" * 32, b""):
            file_hash = _hash(content, position)
            flags, entries = struct.unpack_from("<II", content, position + 32)
            position += RECORD * (1 + entries * (2 if flags & WITH_VERIFICATION else 1))
            if flags & WITH_SHA256:
                found[_hash(content, position)] = file_hash
                position += RECORD
    return found


def _hash(content: bytes, position: int) -> str:
    return "".join(f"{word:016x}" for word in struct.unpack_from("<4Q", content, position))
