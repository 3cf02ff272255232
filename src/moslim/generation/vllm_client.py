"""HTTP client of an inference server, with an API key, limits of time and size, and retries while it is away."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import time
import warnings
from collections.abc import Callable
from html import escape
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any, TypeVar
from urllib.parse import urlsplit

from moslim.utils.errors import UsageError

T = TypeVar("T")

_TRANSIENT = {408, 429, 502, 503, 504}
_PAUSE, _LONGEST_PAUSE = 0.25, 10.0  # seconds
_LIMIT, _LIMIT_OF_ERRORS, _PART = 1 << 22, 1 << 16, 1 << 16  # bytes
_SHOWN = 300  # characters


class ServerError(UsageError, RuntimeError):
    """Error in the use of an inference server: the request, the response, and the remedy."""


class Refused(ServerError):
    """Response with a permanent error status.

    Args:
        message: Request and response.
        status: HTTP status.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Unavailable(ServerError):
    """No response, or one with a transient error status."""


class Client:
    """JSON client of one server. Each request opens a connection, so that threads can share a client.

    Redirections are not followed, since they would disclose the key. The key is read from the environment for each
    request, is not stored, and is removed from quoted responses.

    Args:
        url: ``http://host:port`` or ``https://host:port``; a path is a prefix of every route.
        api_key_env: Name of the environment variable that holds the key; if it is not set, no key is sent.
        timeout: Seconds that a request may take, from the connection to the last byte of the response.
        patience: Seconds to wait for a server that has responded before.

    Raises:
        UsageError: ``url`` or ``api_key_env`` is invalid, or the key cannot be sent. The message holds no secret.
    """

    def __init__(self, url: str, api_key_env: str, timeout: float, patience: float) -> None:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", api_key_env):
            raise UsageError(
                "engine.api_key_env is no name of an environment variable, e.g. VLLM_API_KEY: the key itself belongs "
                "into the variable, not into a config"
            )
        if not timeout > 0 or not patience >= 0:
            raise UsageError(f"engine.timeout is {timeout}, engine.patience {patience}: give seconds above 0")
        self._secure, self._host, self._port, self._prefix = _address(url)
        self.url = url.rstrip("/")
        self.patience = patience
        self._api_key_env = api_key_env
        self._timeout = timeout
        self._has_responded = False
        self._key()

    def get(self, path: str) -> Any:
        """Sends a GET request; see :meth:`post`."""
        return self._request("GET", path, None, _LIMIT)

    def post(self, path: str, body: dict[str, Any], limit: int = _LIMIT) -> Any:
        """Sends a POST request once.

        Args:
            path: Route, e.g. ``/v1/completions``.
            body: Content, sent as JSON.
            limit: Maximal size of the response in bytes.

        Returns:
            The decoded response.

        Raises:
            Unavailable: There is no connection, no complete response in time, or a transient status.
            Refused: The status is another one than 200.
            ServerError: The response is longer than the limit or is not JSON.
        """
        return self._request("POST", path, body, limit)

    def order(self, path: str, body: dict[str, Any]) -> None:
        """Sends a POST request whose response only confirms it: plain text, no content, or JSON; see :meth:`post`.

        Raises:
            ServerError: The response is a web page, or JSON that reports an error.
        """
        self._request("POST", path, body, _LIMIT, is_order=True)

    def patiently(self, attempt: Callable[[], T]) -> T:
        """Repeats a function while the server is unavailable, with growing pauses.

        It is not repeated for a server that has never responded: most likely the address is wrong.

        Args:
            attempt: Function that sends requests. It is repeated as a whole: a restarted server has no state.

        Raises:
            ServerError: The server was unavailable for longer than ``patience``.
        """
        deadline, pause = None, _PAUSE
        while True:
            try:
                return attempt()
            except Unavailable as error:
                if not self._has_responded:
                    raise ServerError(
                        f"no inference server at {self.url}: {error}. Start one first (see docs/vllm.md), "
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

    def _request(self, method: str, path: str, body: dict[str, Any] | None, limit: int, is_order: bool = False) -> Any:
        key = self._key()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        content = None if body is None else json.dumps(body)
        deadline = time.monotonic() + self._timeout
        connection = (HTTPSConnection if self._secure else HTTPConnection)(
            self._host, self._port, timeout=self._timeout
        )
        connection.response_class = lambda sock, **options: _Response(sock, deadline, **options)  # type: ignore[assignment]
        request = f"{method} {self.url}{path}"
        try:
            connection.connect()
            connection.sock.settimeout(_seconds_left(deadline))
            connection.request(method, self._prefix + path, content, headers)
            response = connection.getresponse()
            good = response.status == 200
            text = _read(response, limit if good else _LIMIT_OF_ERRORS)
        except (OSError, HTTPException) as error:  # its text may hold parts of the request
            what = (
                f"no complete response within engine.timeout = {self._timeout:g} s"
                if isinstance(error, TimeoutError)
                else repr(error)
            )
            raise Unavailable(f"{request}: {self.quoted(what)}") from None
        finally:
            connection.close()
        self._has_responded = True
        if not good:
            self._raise_for(request, response, text, key)
        if len(text) > limit:
            raise ServerError(f"{request}: the response is longer than {limit} bytes, more than the request allows")
        content_type = response.headers.get_content_type() if "Content-Type" in response.headers else "nothing"
        if is_order and "html" not in content_type and "json" not in content_type:
            return None
        if "json" not in content_type:
            received = f"{self.quoted(content_type)}: {self.quoted(text)}"
            raise ServerError(f"{request}: the response is not JSON, but {received}: is it vLLM?")
        try:
            reply = json.loads(text.decode()) if text or not is_order else None
        except (ValueError, RecursionError):
            raise ServerError(f"{request}: the response is not complete JSON: {self.quoted(text)}") from None
        if isinstance(reply, dict) and reply.get("error"):
            raise ServerError(f"{request}: the response reports an error: {self.quoted(text)}")
        return reply

    def _raise_for(self, request: str, response: HTTPResponse, text: bytes, key: str) -> None:
        status = response.status
        if status in _TRANSIENT:
            raise Unavailable(f"{request}: status {status}: {self.quoted(text)}")
        if status in (401, 403):
            sent = "refused the key in" if key else "wants a key: set"
            raise Refused(f"{self.url} {sent} the environment variable {self._api_key_env}", status)
        if 300 <= status < 400:
            raise Refused(
                f"{request}: status {status}, it redirects{_where(response.headers.get('Location'))}, which is not "
                "followed: give that address in engine.urls if it is the server",
                status,
            )
        raise Refused(f"{request}: status {status}: {self.quoted(text)}", status)

    def _key(self) -> str:
        """The key, or an empty text. It is only ever held in local variables."""
        key = os.environ.get(self._api_key_env, "").strip()
        if not re.fullmatch(r"[\x21-\x7e]*", key):
            raise UsageError(
                f"the key in the environment variable {self._api_key_env} holds a space, a line break, or a "
                "character that is not ASCII, and cannot be sent: set it anew"
            )
        return key

    def quoted(self, value: Any) -> str:
        """A value from the server as one short line, without control characters and without the key."""
        text = (
            value.decode(errors="replace")
            if isinstance(value, bytes)
            else value
            if isinstance(value, str)
            else repr(value)
        )
        key = self._key()
        return shown(_spellings(key).sub("[the key]", text) if key else text)


class _Response(HTTPResponse):
    """Response that is read until a deadline; the timeout of a socket restarts with each byte.

    Args:
        sock: Connection.
        deadline: Time of ``time.monotonic``.
        options: Arguments of the base class.
    """

    def __init__(self, sock: socket.socket, deadline: float, **options: Any) -> None:
        super().__init__(sock, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_DeadlineReader(sock, deadline))


class _DeadlineReader(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open until this is closed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_seconds_left(self._deadline))
        return self._raw.readinto(buffer)  # type: ignore[attr-defined,no-any-return]

    def close(self) -> None:
        self._raw.close()
        super().close()


def shown(text: str) -> str:
    """A text from outside as one short line without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _spellings(key: str) -> re.Pattern[str]:
    """Pattern of a key as it is, and as JSON, URLs and HTML escape it, once or several times."""

    def spellings(character: str) -> str:
        code = ord(character)
        escapes = (f"%{code:02x}", f"u{code:04x}", f"&#{code};", f"&#x{code:x};", escape(character))
        return rf"\\*(?:{'|'.join(map(re.escape, (character, *escapes)))})"

    return re.compile("".join(map(spellings, key)), re.IGNORECASE)


def _where(location: str | None) -> str:
    """Host of a redirection for an error text; the rest of the address may hold a secret."""
    try:
        host = urlsplit(location or "").hostname
    except ValueError:
        host = None
    return f" to {shown(host)}" if host else ""


def _address(url: str) -> tuple[bool, str, int | None, str]:
    """Parts of a server's address: whether it is ``https``, host, port and path."""
    example = "give e.g. http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
    except ValueError:
        raise UsageError(f"engine.urls holds what is no address of a server: {example}") from None
    if parts.username is not None or "@" in url:
        raise UsageError(
            "engine.urls holds an address with a name or password before `@`, which would stand in configs and logs: "
            "leave them out; a key belongs into the environment variable that engine.api_key_env names"
        )
    if parts.query or parts.fragment or "?" in url or "#" in url:
        raise UsageError(f"engine.urls holds an address with `?` or `#`: {example}, or a path behind it")
    if parts.scheme not in ("http", "https") or not host or not re.fullmatch(r"[\x21-\x7e]+", url):
        raise UsageError(f"engine.urls: {shown(url)!r} is no address of a server: {example}")
    return parts.scheme == "https", host, port, parts.path.rstrip("/")


def _read(response: HTTPResponse, limit: int) -> bytes:
    """Reads the body, up to a little more than the limit."""
    parts, size = [], 0
    while size <= limit and (part := response.read1(_PART)):
        parts.append(part)
        size += len(part)
    if size <= limit and response.length:  # the connection ended early, which `read1` does not report
        raise HTTPException(f"{size} bytes instead of {size + response.length}")
    return b"".join(parts)


def _seconds_left(deadline: float) -> float:
    seconds = deadline - time.monotonic()
    if seconds <= 0:
        raise TimeoutError
    return seconds
