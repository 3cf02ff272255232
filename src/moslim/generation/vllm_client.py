"""HTTP to an inference server: a key, limits of time and size, and patience with a server that is away for a while."""

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

_PASSING = {408, 429, 502, 503, 504}
_PAUSE, _LONGEST_PAUSE = 0.25, 10.0  # seconds
_LIMIT, _LIMIT_OF_ERRORS, _PART = 1 << 22, 1 << 16, 1 << 16  # bytes
_SHOWN = 300  # characters


class ServerError(UsageError, RuntimeError):
    """An inference server cannot be used: what was asked, what it said, and what to do."""


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

    Redirections are not followed, as the key would go with them. The key is read from the environment when it is
    needed, kept nowhere, and taken out of whatever the server says.

    Args:
        url: ``http://host:port``, or ``https``; a path is put before every route.
        api_key_env: Name of the environment variable that holds the key; no key is sent where it is not set.
        timeout: Seconds that a request may take, from the connection to the last byte of the answer.
        patience: Seconds to wait for a server that has answered before and does so no more.

    Raises:
        UsageError: ``url`` or ``api_key_env`` is none, or the key cannot be sent. The message repeats no secret.
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
        self._known = False  # whether it has ever answered
        self._key()

    def get(self, path: str) -> Any:
        """One request; see :meth:`post`."""
        return self._request("GET", path, None, _LIMIT)

    def post(self, path: str, body: dict[str, Any], limit: int = _LIMIT) -> Any:
        """One request, tried once.

        Args:
            path: The route, e.g. ``/v1/completions``.
            body: Sent as JSON.
            limit: Bytes that the answer may have.

        Returns:
            The answer, decoded.

        Raises:
            Unavailable: No connection, no whole answer in time, or a status that passes.
            Refused: Any other status than 200.
            ServerError: The answer is longer than the limit, or no JSON.
        """
        return self._request("POST", path, body, limit)

    def order(self, path: str, body: dict[str, Any]) -> None:
        """A request whose answer says no more than that it was done; see :meth:`post`.

        vLLM says so in plain text, by nothing at all, or in JSON.

        Raises:
            ServerError: It sent a web page, or JSON that tells of an error.
        """
        self._request("POST", path, body, _LIMIT, is_order=True)

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

    def _request(self, method: str, path: str, body: dict[str, Any] | None, limit: int, is_order: bool = False) -> Any:
        key = self._key()
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
        content = None if body is None else json.dumps(body)
        deadline = time.monotonic() + self._timeout
        connection = (HTTPSConnection if self._secure else HTTPConnection)(
            self._host, self._port, timeout=self._timeout
        )
        connection.response_class = lambda sock, **options: _Response(sock, deadline, **options)  # type: ignore[assignment]
        asked = f"{method} {self.url}{path}"
        try:
            connection.connect()
            connection.sock.settimeout(_left(deadline))
            connection.request(method, self._prefix + path, content, headers)
            response = connection.getresponse()
            good = response.status == 200
            text = _read(response, limit if good else _LIMIT_OF_ERRORS)
        except (OSError, HTTPException) as error:  # whose own text may repeat what the server was sent
            what = f"no whole answer within engine.timeout = {self._timeout:g} s" if _late(error) else repr(error)
            raise Unavailable(f"{asked}: {self.said(what)}") from None
        finally:
            connection.close()
        self._known = True
        if not good:
            self._refuse(asked, response, text, key)
        if len(text) > limit:
            raise ServerError(
                f"{asked}: the answer is longer than {limit} bytes, more than what was asked for can take"
            )
        content_type = response.headers.get_content_type() if "Content-Type" in response.headers else "nothing"
        if is_order and "html" not in content_type and "json" not in content_type:
            return None
        if "json" not in content_type:
            came = f"{self.said(content_type)}: {self.said(text)}"
            raise ServerError(f"{asked}: the answer is no JSON, but {came}: is it vLLM?")
        try:
            found = json.loads(text.decode()) if text or not is_order else None
        except (ValueError, RecursionError):
            raise ServerError(f"{asked}: the answer is no whole JSON: {self.said(text)}") from None
        if isinstance(found, dict) and found.get("error"):
            raise ServerError(f"{asked}: the answer tells of an error: {self.said(text)}")
        return found

    def _refuse(self, asked: str, response: HTTPResponse, text: bytes, key: str) -> None:
        status = response.status
        if status in _PASSING:
            raise Unavailable(f"{asked}: status {status}: {self.said(text)}")
        if status in (401, 403):
            sent = "refused the key in" if key else "wants a key: set"
            raise Refused(f"{self.url} {sent} the environment variable {self._api_key_env}", status)
        if 300 <= status < 400:
            raise Refused(
                f"{asked}: status {status}, it redirects{_where(response.headers.get('Location'))}, which is not "
                "followed: give that address in engine.urls if it is the server",
                status,
            )
        raise Refused(f"{asked}: status {status}: {self.said(text)}", status)

    def _key(self) -> str:
        """The key, or nothing; only ever a local variable of a request."""
        key = os.environ.get(self._api_key_env, "").strip()
        if not re.fullmatch(r"[\x21-\x7e]*", key):
            raise UsageError(
                f"the key in the environment variable {self._api_key_env} holds a space, a line break, or something "
                "else than ASCII, and cannot be sent: set it anew"
            )
        return key

    def said(self, value: Any) -> str:
        """What the server said, in one short line, without control characters and without the key in any spelling."""
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
    """A response that is read until a moment in time, however slowly the server sends: the time-out of a socket starts
    anew with each byte.

    Args:
        sock: The connection.
        deadline: That moment, by ``time.monotonic``.
        options: Those of ``http.client``.
    """

    def __init__(self, sock: socket.socket, deadline: float, **options: Any) -> None:
        super().__init__(sock, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Until(sock, deadline))


class _Until(io.RawIOBase):
    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock, self._deadline = sock, deadline
        self._raw = sock.makefile("rb", buffering=0)  # keeps the socket open until this is closed

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self._sock.settimeout(_left(self._deadline))
        return self._raw.readinto(buffer)  # type: ignore[attr-defined,no-any-return]

    def close(self) -> None:
        self._raw.close()
        super().close()


def shown(text: str) -> str:
    """A text that came from outside, in one short line without control characters."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}..."


def _spellings(key: str) -> re.Pattern[str]:
    """Finds a key as it is, and as JSON, URLs and web pages write it, escaped once or again."""

    def spelled(character: str) -> str:
        code = ord(character)
        others = (f"%{code:02x}", f"u{code:04x}", f"&#{code};", f"&#x{code:x};", escape(character))
        return rf"\\*(?:{'|'.join(map(re.escape, (character, *others)))})"

    return re.compile("".join(map(spelled, key)), re.IGNORECASE)


def _where(location: str | None) -> str:
    """The host of a redirection; what else stands there may be a secret."""
    try:
        host = urlsplit(location or "").hostname
    except ValueError:
        host = None
    return f" to {shown(host)}" if host else ""


def _address(url: str) -> tuple[bool, str, int | None, str]:
    """Scheme, host, port and path of a server's address."""
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
    """The body, or a little more of it than the limit."""
    parts, size = [], 0
    while size <= limit and (part := response.read1(_PART)):
        parts.append(part)
        size += len(part)
    if size <= limit and response.length:  # the connection ended before what was announced; `read1` does not say so
        raise HTTPException(f"{size} bytes instead of {size + response.length}")
    return b"".join(parts)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _late(error: BaseException) -> bool:
    return isinstance(error, TimeoutError)
