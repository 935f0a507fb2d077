"""A line between a node and the SuperLink that can be cut, slowed down, or change a bit: a TCP proxy on loopback."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import suppress

PIECE = 16384
"""Bytes that pass as one."""


class Line:
    """Connections to a port of this machine. rate: bytes a second and connection, 0 for as many as there are."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.rate = 0.0
        self.bend = False
        self._cut = False
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def cut(self) -> bool:
        """Whether nothing passes. What was connected is reset."""
        return self._cut

    @cut.setter
    def cut(self, now: bool) -> None:
        self._cut = now
        if now:
            self._hang_up()

    def close(self) -> None:
        """End it."""
        self._listener.close()
        self._hang_up()

    def _hang_up(self) -> None:
        for end in list(self._open):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                if self._cut:
                    raise ConnectionError("the line is cut")
                far = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                near.close()
                continue
            self._open |= {near, far}
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._carry, args=(source, sink), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while piece := source.recv(PIECE):
                if self.bend:
                    self.bend, piece = False, bytes([*piece[:-1], piece[-1] ^ 1])
                if self.rate:
                    time.sleep(len(piece) / self.rate)
                sink.sendall(piece)
        for end in (source, sink):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            self._open.discard(end)
            end.close()
