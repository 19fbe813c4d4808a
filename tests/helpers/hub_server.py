"""A Hub on loopback, in the standard library: the HTTP surface of the real one, and faults.

    with Hub() as hub:
        hub.fault("commit", drop=True, after=True, times=1)  # the work is done, the answer is lost
        HfApi(endpoint=hub.url, token=TOKEN).create_repo("alice/drafter")

State lives in memory and tests read it directly: ``history``, ``content``, ``requests``.
"""

import json
import math
import re
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from operator import attrgetter
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from hub_state import READ_ONLY, TOKEN, HubState
from hub_storage import RefusalError, Reply, Request

__all__ = ["READ_ONLY", "TOKEN", "Fault", "Hub"]

REPO, REV, PATH = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)", r"(?P<path>.+)"
ROUTES = [  # method, path, and the method of HubState that answers
    ("GET", r"/api/whoami-v2", "whoami"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", rf"/api/models/{REPO}/preupload/{REV}", "preupload"),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "storage.batch"),
    ("PUT", r"/lfs/(?P<oid>\w{64})(/(?P<part>\d+))?", "storage.upload"),
    ("POST", r"/lfs/(?P<oid>\w{64})/complete", "storage.complete"),
    ("POST", r"/lfs/(?P<oid>\w{64})/verify", "storage.verify"),
    ("POST", rf"/api/models/{REPO}/commit/{REV}", "commit"),
    ("GET", rf"/api/models/{REPO}/tree/{REV}(/{PATH})?", "tree"),
    ("POST", rf"/api/models/{REPO}/paths-info/{REV}", "paths_info"),
    ("GET", rf"/api/models/{REPO}/refs", "refs"),
    ("GET", rf"/api/models/{REPO}/commits/{REV}", "commits"),
    ("POST", rf"/api/models/{REPO}/tag/{REV}", "tag"),
    ("POST", rf"/api/models/{REPO}/branch/{REV}", "branch"),
    ("GET", rf"/api/models/{REPO}/xet-(read|write)-token/{REV}", "storage.xet_token"),
    ("GET", rf"/api/models/{REPO}(/revision/{REV})?", "info"),
    ("HEAD", rf"/{REPO}/resolve/{REV}/{PATH}", "resolve"),
    ("GET", rf"/{REPO}/resolve/{REV}/{PATH}", "resolve"),
]


@dataclass
class Fault:
    """What goes wrong with a route: silence for ``hang`` seconds, then a status or a cut line.

    ``after`` means that the request's work is done before anything goes wrong; with ``cut`` so many
    bytes of its answer come, and with ``flip`` all of it, one bit changed. ``where`` is a pattern
    that method and address must hold.
    """

    route: str
    where: str = ""
    cut: int | None = None
    flip: bool = False
    status: int | None = None
    drop: bool = False
    hang: float = 0.0
    after: bool = False
    times: float = math.inf
    headers: dict[str, str] = field(default_factory=dict)
    met: int = 0


class Hub(HubState):
    def __init__(self, *, part_size: int | None = None, xet: Path | None = None):
        super().__init__(part_size=part_size, xet=xet)
        self.requests: list[tuple[str, str]] = []  # (route, method and address)
        self.received = bytearray()  # every address and body, in the order of arrival
        self.faults: list[Fault] = []
        self.closing = threading.Event()

    def __enter__(self) -> "Hub":
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.url = self.storage.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def fault(self, route: str, **what) -> Fault:
        self.faults.append(Fault(route, **what))
        return self.faults[-1]

    def take_fault(self, name: str, address: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                named = fault.route in (name, "any") and re.search(fault.where, address)
                if named and fault.times > 0:
                    fault.times -= 1
                    fault.met += 1
                    return fault
        return None

    def count(self, route: str) -> int:
        return sum(seen == route for seen, _ in self.requests)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a connection kept alive must not delay a test

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # clients get killed here
            super().handle_error(request, client_address)


def route(method: str, path: str) -> tuple[str, dict[str, str | None]]:
    """A data set has the routes of a model below a prefix, which is then part of its name."""
    plain = re.sub(r"^(/api)?/datasets/", lambda m: "/api/models/" if m[1] else "/", path)
    for expected, pattern, name in ROUTES:
        found = re.fullmatch(pattern, plain)
        if method == expected and found is not None:
            args = {key: value and unquote(value) for key, value in found.groupdict().items()}
            if plain != path:
                args["repo"] = f"datasets/{args['repo']}"
            return name, args
    return "unknown", {}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        body, address = self.read_body(), urlsplit(self.path)
        name, args = route(self.command, address.path)
        with self.server.hub.lock:
            self.server.hub.requests.append((name, f"{self.command} {self.path}"))
            self.server.hub.received += self.path.encode() + b"\n" + body + b"\n"
        fault = self.server.hub.take_fault(name, f"{self.command} {self.path}")
        if fault is not None and not fault.after and self.fail(fault):
            return
        query = parse_qs(address.query)
        reply = self.work(name, Request(self.command, None, args, query, self.headers, body))
        if fault is None or not fault.after or not self.fail(fault):
            self.answer(reply, fault)

    do_POST = do_PUT = do_HEAD = do_GET  # noqa: N815 (http.server's names)

    def work(self, name: str, request: Request) -> Reply:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        request.user = self.server.hub.users.get(token)
        try:
            if token and request.user is None:
                raise RefusalError(401)
            with self.server.hub.lock:
                return attrgetter(name)(self.server.hub)(request)
        except RefusalError as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            return Reply({"error": refusal.code or "refused"}, refusal.status, headers)

    def fail(self, fault: Fault) -> bool:
        """True when the fault was the answer."""
        if fault.hang:
            self.server.hub.closing.wait(fault.hang)
        if fault.drop:
            self.close_connection = True
            return True
        if fault.status is not None:
            self.answer(Reply({"error": "injected"}, fault.status, fault.headers))
            return True
        return False

    def answer(self, reply: Reply, fault: Fault | None = None) -> None:
        content = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
        size = len(content)
        if fault is not None and fault.flip:
            content = bytes([content[0] ^ 1]) + content[1:]
        if fault is not None and fault.cut is not None:
            content, self.close_connection = content[: fault.cut], True
        try:
            self.send_response(reply.status)
            for key, value in reply.headers.items():
                self.send_header(key, value)
            if "Content-Length" not in reply.headers:
                self.send_header("Content-Length", str(size))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
        except ConnectionError:  # the client was killed
            self.close_connection = True

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def log_message(self, *_) -> None:
        """Silence: the tests read ``Hub.requests``."""
