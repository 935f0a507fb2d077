"""The worker's door: callers come in over the unix socket, and those who show the token are heard one after another.

Who withdraws a turn is heard before the others, also in the middle of a training (`next_urgent`). A caller without the
token costs a few bytes of memory and a line of the log. It keeps nobody waiting: the door hears the greetings of all
callers at the same time.
"""

from __future__ import annotations

import hmac
import logging
import selectors
import socket
import time
from collections import deque
from contextlib import suppress

from fedloom.site.protocol import GREETING_BYTES, WRONG_TOKEN, error_parcel, greeting, send_parcel

log = logging.getLogger("fedloom.worker")

GREETING_SECONDS = 2.0
"""How long a caller may take for its greeting. The relay has the token at hand before it connects."""
MOST_STRANGERS = 64
"""Callers whose greeting is heard at the same time; the one that came first gives way to a further one."""


class Door:
    """Takes callers from a listening socket. `close` sends away those who still wait."""

    def __init__(self, listener: socket.socket, token: str) -> None:
        self.listener = listener
        self.listener.setblocking(False)
        self._greeting, self._urgent_greeting = greeting(token), greeting(token, urgent=True)
        self._strangers: dict[socket.socket, tuple[bytearray, float]] = {}
        self._admitted: deque[tuple[socket.socket, float]] = deque()
        self._urgent: deque[socket.socket] = deque()
        self.waited = 0.0
        """Seconds that the caller who was handed over last had waited."""

    def next_caller(self, seconds: float) -> socket.socket | None:
        """The next caller that has shown the token; None if none did within so many seconds."""
        until = time.monotonic() + seconds
        while not self._admitted and not self._urgent:
            left = until - time.monotonic()
            self._listen(max(left, 0.0))
            if left <= 0 and not self._admitted and not self._urgent:
                return None
        if self._urgent:
            self.waited = 0.0
            return self._urgent.popleft()
        connection, since = self._admitted.popleft()
        self.waited = time.monotonic() - since
        return connection

    def next_urgent(self) -> socket.socket | None:
        """The next caller who brings a withdrawal, if one is there now."""
        self._listen(0.0)
        return self._urgent.popleft() if self._urgent else None

    def close(self) -> None:
        """Hang up on everybody who waits."""
        for connection in (*self._strangers, *self._urgent, *(waiting for waiting, _ in self._admitted)):
            connection.close()
        for held in (self._strangers, self._urgent, self._admitted):
            held.clear()

    def _listen(self, seconds: float) -> None:
        """Hear everybody who has something to say, now or within so many seconds."""
        for ready in self._readable(seconds):
            if ready is self.listener:
                self._take_in()
            elif ready in self._strangers:  # it may have had to give way meanwhile
                self._hear(ready)
        # Only now: what a caller sent while the worker was busy counts, however long ago that was.
        self._send_away_the_late()

    def _readable(self, seconds: float) -> list[socket.socket]:
        """Of the listener and the strangers those that have something, or the first of them that will."""
        everybody = {known.fileno(): known for known in (self.listener, *self._strangers)}
        with selectors.DefaultSelector() as selector:
            for number in everybody:
                selector.register(number, selectors.EVENT_READ)
            return [everybody[key.fd] for key, _ in selector.select(seconds)]

    def _take_in(self) -> None:
        """Let the callers in that wait outside. A relay's greeting is here already."""
        for _ in range(MOST_STRANGERS):
            try:
                connection, _ = self.listener.accept()
            except BlockingIOError:
                return
            connection.setblocking(False)
            if len(self._strangers) == MOST_STRANGERS:
                self._dismiss(next(iter(self._strangers)))
            self._strangers[connection] = (bytearray(), time.monotonic() + GREETING_SECONDS)
            self._hear(connection)

    def _hear(self, connection: socket.socket) -> None:
        """Read on in a greeting; once it is whole, its caller is admitted or refused."""
        heard, _ = self._strangers[connection]
        try:
            piece = connection.recv(GREETING_BYTES - len(heard))
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        heard += piece
        if not piece:
            self._dismiss(connection)
        elif len(heard) == GREETING_BYTES:
            urgent = hmac.compare_digest(bytes(heard), self._urgent_greeting)
            if urgent or hmac.compare_digest(bytes(heard), self._greeting):
                del self._strangers[connection]
                connection.setblocking(True)
                if urgent:
                    self._urgent.append(connection)
                else:
                    self._admitted.append((connection, time.monotonic()))
            else:
                log.warning("a request without the token was refused")
                with suppress(OSError):
                    send_parcel(connection, error_parcel(WRONG_TOKEN))
                self._dismiss(connection)

    def _send_away_the_late(self) -> None:
        now = time.monotonic()
        for connection, (_, until) in list(self._strangers.items()):
            if now > until:
                self._dismiss(connection)

    def _dismiss(self, connection: socket.socket) -> None:
        del self._strangers[connection]
        connection.close()
