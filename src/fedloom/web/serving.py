"""The server: a socket that is bound before its address is said, and uvicorn on it until somebody presses Ctrl-C."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from pathlib import Path

import uvicorn

from fedloom.errors import ConfigError
from fedloom.garbage import collect_as_usual
from fedloom.web.app import make_app
from fedloom.web.board import Board
from fedloom.web.guard import allowed_hosts, is_loopback
from fedloom.web.runs import Runs

PORT = 8321
"""Where runs are served unless the user says otherwise: an open page finds a server again that was restarted."""


class Service:
    """Runs that are served: bound to its address from the beginning, answering once `serve` is called.

    port: None for `PORT`, or a free one where that is taken; 0 for a free one. is_open: whether others than this
    machine may reach it, which is refused unless `anyone` may.
    Raises ConfigError where a folder holds no run, or the address cannot be had.
    """

    def __init__(
        self, paths: Sequence[Path], *, host: str = "127.0.0.1", port: int | None = None, anyone: bool = False
    ) -> None:
        self.is_open = not is_loopback(host)
        if self.is_open and not anyone:
            raise ConfigError(
                f"--host {host}: everybody who reaches this machine could read these runs, for there is no password; "
                f"from elsewhere better take a tunnel, ssh -L {port or PORT}:127.0.0.1:{port or PORT} THIS-MACHINE, "
                "or add --anyone if that is what you want"
            )
        self.runs = Runs(paths)
        self._socket = _bind(host, port)
        shown = "127.0.0.1" if host in ("0.0.0.0", "") else "::1" if host == "::" else host
        place = f"[{shown}]" if ":" in shown else shown
        self.url = f"http://{place}:{self._socket.getsockname()[1]}/"
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(Board(self.runs), allowed_hosts(host)),
                http="h11",
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=1,
            )
        )

    def serve(self) -> None:
        """Answer until Ctrl-C, or until `stop` is called by another thread."""
        collect_as_usual()
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self.close()

    def close(self) -> None:
        """Give the address back, where nothing was served or is any more."""
        self._socket.close()

    def stop(self) -> None:
        """Have `serve` return."""
        self._server.should_exit = True


def _bind(host: str, port: int | None) -> socket.socket:
    """A socket that listens: whoever asks from now on is answered as soon as the server runs."""
    try:
        return _listen(host, PORT if port is None else port)
    except OSError as error:
        taken = error.errno in (errno.EADDRINUSE, errno.EACCES)
        if port is None and taken:
            return _bind(host, 0)
        if taken:
            raise ConfigError(
                f"--port {port} cannot be had on {host}: {error.strerror}; name another, or --port 0 for a free one"
            ) from None
        raise ConfigError(f"--host {host}: {error.strerror or error}; expected an address of this machine") from None


def _listen(host: str, port: int) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    family, kind, protocol, _, address = found[0]
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
    except OSError:
        bound.close()
        raise
    return bound
