"""A server that answers every request with given bytes, at a given pace."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from threading import Thread


class RawServer:
    """Listens on 127.0.0.1, as a thread of the test.

    Args:
        parts: What to send, part by part; ``{request}`` in it is what the client sent.
        pause: Seconds between two parts.
    """

    def __init__(self, parts: Iterable[bytes], pause: float = 0.0) -> None:
        self._parts, self._pause = parts, pause
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.requests: list[bytes] = []
        self.sent = 0
        Thread(target=self._serve, daemon=True).start()

    def stop(self) -> None:
        self._socket.close()

    def _serve(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            request = connection.recv(1 << 16)
            self.requests.append(request)
            for part in self._parts:
                connection.sendall(part.replace(b"{request}", request))
                self.sent += len(part)
                time.sleep(self._pause)
            connection.shutdown(socket.SHUT_WR)
            connection.settimeout(1)
            while connection.recv(1 << 16):  # closed over unread bytes, the connection would be reset
                pass


def reply(body: bytes, status: str = "200 OK", kind: str = "application/json", more: str = "") -> list[bytes]:
    """A whole HTTP response."""
    head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return [head.encode() + body]
