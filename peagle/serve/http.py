"""A request to an engine over HTTP."""

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

HEALTH_TIMEOUT_S = 5.0
Address = int | str  # a port of this machine, or "HOST:PORT"


@contextmanager
def request(
    address: Address, method: str, path: str, body: bytes | None = None, *, timeout_s: float
) -> Iterator[http.client.HTTPResponse]:
    """The engine's response, to be read within the block, whatever its status."""
    place = address if isinstance(address, str) else f"127.0.0.1:{address}"
    connection = http.client.HTTPConnection(place, timeout=timeout_s)
    try:
        connection.request(method, path, body, {"Content-Type": "application/json"})
        yield connection.getresponse()
    finally:
        connection.close()


def is_healthy(address: Address) -> bool:
    """Whether an engine is there and says that it can be asked."""
    try:
        with request(address, "GET", "/health", timeout_s=HEALTH_TIMEOUT_S) as response:
            return response.status == 200
    except (OSError, http.client.HTTPException):
        return False


@contextmanager
def posted(
    address: Address, path: str, body: dict[str, Any], *, timeout_s: float
) -> Iterator[http.client.HTTPResponse]:
    """The engine's response to a request that it accepts, to be read within the block.

    Args:
        timeout_s: how long the engine may be silent.

    Raises:
        ValueError: if the engine refuses the request, with its reason.
        OSError: if it does not answer, or breaks off.
    """
    try:
        content = json.dumps(body).encode()
        with request(address, "POST", path, content, timeout_s=timeout_s) as response:
            if response.status != 200:
                refuse(response.status, response.read().decode(errors="replace"))
            yield response
    except http.client.HTTPException as error:
        raise OSError(f"the engine broke off an answer ({error!r})") from error


def refuse(status: int, text: str) -> None:
    """Status 4xx: the user must fix the request. Otherwise the engine failed."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text.strip()
    if 400 <= status < 500:
        raise ValueError(f"the engine refuses the request: {message}")
    raise OSError(f"the engine answered with status {status}: {message}")
