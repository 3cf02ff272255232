"""HTTP to an inference server: a key, time-outs, and patience with a server that is away for a while."""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Callable
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, TypeVar
from urllib.parse import urlsplit

from moslim.errors import UsageError

T = TypeVar("T")

_PASSING = {408, 429, 502, 503, 504}
_PAUSE, _LONGEST_PAUSE = 0.25, 10.0  # seconds


class ServerError(RuntimeError):
    """An inference server cannot be used: what it said, and what to do."""


class Refused(ServerError):
    """The server understood and said no.

    Args:
        message: What was asked and what it said.
        status: HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unavailable(ServerError):
    """No answer, or one that says to come back later."""


class Client:
    """Talks JSON to one server, with a new connection for every request, so that threads can share it.

    Args:
        url: ``http://host:port``, or ``https``; a path is put before every route.
        api_key_env: Name of the environment variable that holds the key; no key is sent where it is not set.
        timeout: Seconds that the server may take over an answer.
        patience: Seconds to wait for a server that has answered before and does so no more.

    Raises:
        UsageError: ``url`` is none.
    """

    def __init__(self, url: str, api_key_env: str, timeout: float, patience: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UsageError(f"engine.urls: '{url}' is no address of a server: give e.g. http://127.0.0.1:8000")
        self.url = url.rstrip("/")
        self.patience = patience
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._prefix = parts.path.rstrip("/")
        self._api_key_env = api_key_env
        self._timeout = timeout
        self._known = False  # whether it has ever answered

    def get(self, path: str) -> Any:
        """One request; see :meth:`post`."""
        return self._request("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """One request, tried once.

        Args:
            path: The route, e.g. ``/v1/completions``.
            body: Sent as JSON.

        Returns:
            The answer, decoded; None where it is not JSON.

        Raises:
            Unavailable: No connection, no answer in time, or a status that passes.
            Refused: Any other status than success.
        """
        return self._request("POST", path, body)

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Repeats an attempt while the server is away, with growing pauses.

        A server that never answered is not waited for: most likely it was not started, or the address is wrong.

        Args:
            attempt: Makes requests; it is repeated as a whole, as a server that was restarted has forgotten the past.

        Raises:
            ServerError: The server stayed away for longer than ``patience``.
        """
        deadline, pause = None, _PAUSE
        while True:
            try:
                return attempt()
            except Unavailable as error:
                if not self._known:
                    raise ServerError(
                        f"no inference server at {self.url}: {error}. Start one first (docs/vllm.md says how), "
                        "give its address in engine.urls, or sample in this process with TorchEngine"
                    ) from error
                if deadline is None:
                    deadline = time.monotonic() + self.patience
                    warnings.warn(f"waiting up to {self.patience:g} s for {self.url}: {error}", stacklevel=2)
                if time.monotonic() + pause > deadline:
                    raise ServerError(
                        f"{self.url} was away for more than engine.patience = {self.patience:g} s: {error}"
                    ) from error
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def _request(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        kind = HTTPSConnection if self._secure else HTTPConnection
        connection = kind(self._host, self._port, timeout=self._timeout)
        key = os.environ.get(self._api_key_env)
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        content = None if body is None else json.dumps(body)
        try:
            connection.request(method, self._prefix + path, content, headers)
            response = connection.getresponse()
            text = response.read().decode()
        except (OSError, HTTPException) as error:
            raise Unavailable(f"{method} {path}: {type(error).__name__}: {error}") from error
        finally:
            connection.close()
        self._known = True
        if response.status in _PASSING:
            raise Unavailable(f"{method} {path}: status {response.status}: {text[:500]}")
        if response.status in (401, 403):
            sent = "refused the key in" if key else "wants a key: set"
            raise Refused(f"{self.url} {sent} the environment variable {self._api_key_env}", response.status)
        if response.status >= 400:
            raise Refused(f"{self.url}{path}: status {response.status}: {text[:500]}", response.status)
        return json.loads(text) if "json" in response.headers.get("Content-Type", "") else None
