"""A request to an engine over HTTP."""

import http.client
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def posted(
    port: int, path: str, body: dict[str, Any], *, timeout_s: float
) -> Iterator[http.client.HTTPResponse]:
    """The engine's response, to be read within the block.

    Args:
        timeout_s: how long the engine may be silent.

    Raises:
        ValueError: if the engine refuses the request, with its reason.
        OSError: if it does not answer, or breaks off.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout_s)
    try:
        content = json.dumps(body).encode()
        connection.request("POST", path, content, {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            refuse(response.status, response.read().decode(errors="replace"))
        yield response
    except http.client.HTTPException as error:
        raise OSError(f"the engine broke off an answer ({error!r})") from error
    finally:
        connection.close()


def refuse(status: int, text: str) -> None:
    """A request that the engine does not accept is the user's to mend; all else is its own."""
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = text.strip()
    if 400 <= status < 500:
        raise ValueError(f"the engine refuses the request: {message}")
    raise OSError(f"the engine answered with status {status}: {message}")
