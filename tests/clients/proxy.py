"""A TCP proxy on a loopback port that counts what clients send, and does something once when enough has come through."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class Proxy:
    """``sent``: bytes from clients so far. ``at(n, action)`` runs ``action`` before byte ``n`` from now on goes on to the server."""

    def __init__(self, server: str) -> None:
        target = urlsplit(server)
        self._target = (target.hostname, target.port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[socket.socket] = []
        self._trigger: tuple[int, Callable[[], None]] | None = None
        self.sent = 0
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def at(self, nbytes: int, action: Callable[[], None]) -> None:
        self._trigger = (self.sent + nbytes, action)

    def cut(self) -> None:
        """Break all connections; new ones are taken."""
        for connection in self._connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection(self._target)
                self._connections += [client, server]
                threading.Thread(target=self._pump, args=(client, server, True), daemon=True).start()
                threading.Thread(target=self._pump, args=(server, client, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with suppress(OSError), source:
            while chunk := source.recv(1 << 16):
                if counts:
                    self._count(len(chunk))
                sink.sendall(chunk)
            sink.shutdown(socket.SHUT_WR)

    def _count(self, nbytes: int) -> None:
        self.sent += nbytes
        if self._trigger is not None and self.sent >= self._trigger[0]:
            _, action = self._trigger
            self._trigger = None
            action()


@contextmanager
def proxy(server: str) -> Iterator[Proxy]:
    """A proxy in front of a server."""
    running = Proxy(server)
    try:
        yield running
    finally:
        running.close()
