"""`fedloom worker SITE.toml`: a long-lived process that holds a site's model and data and takes one request at a time.

It listens on a unix socket that only its own user may open, and answers only those who show the token. SuperNodes and
ClientApps may come and go; whoever asks while a request is being worked on waits for its turn.
"""

from __future__ import annotations

import fcntl
import hmac
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import FrameType

from fedloom.errors import FedloomError, SiteError
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import Parcel, receive, send

log = logging.getLogger("fedloom.worker")

READ_SECONDS = 30.0
"""How long a caller may take to send the next piece of a request."""
TICK_SECONDS = 1.0


class _Stop(BaseException):
    """The system asked the process to end."""


def serve(site: SiteConfig) -> None:
    """Answer requests until the process is told to end. Raises SiteError where another worker serves this site."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    state = Path(site.state)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SiteError(f"another worker is using {state}; a site has one worker") from None
        token = own_token(Path(site.token_file), site.socket_group)
        signal.signal(signal.SIGTERM, _stop)
        path = Path(site.socket)
        with _listening(path, site.socket_group) as listener:
            try:
                _loop(listener, Desk(site), token, 60 * site.idle_minutes)
            except _Stop:
                log.info("the worker ends")
            finally:
                path.unlink(missing_ok=True)


def own_token(path: Path, group: str | None = None) -> str:
    """The secret in the file, made on first use. Raises SiteError where others than owner and `group` may read it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if path.stat().st_mode & (0o037 if group else 0o077):
            raise SiteError(f"{path} may be read by others than its owner: chmod 600 {path}") from None
    else:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
    _share(path, group, 0o640)
    return path.read_text(encoding="utf-8").strip()


def _share(path: Path, group: str | None, mode: int) -> None:
    """Let the group use a file of ours. Raises SiteError where this machine has no such group, or we are not in it."""
    if group is None:
        return
    try:
        shutil.chown(path, group=group)
        path.chmod(mode)
    except (LookupError, OSError) as error:
        raise SiteError(f"socket_group {group!r} cannot be given {path}: {error}") from None


def _listening(path: Path, group: str | None = None) -> socket.socket:
    """A socket that only this user and `group` may connect to. What a dead worker left behind is cleared away."""
    path.unlink(missing_ok=True)  # nobody listens there: the lock is ours
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise SiteError(f"cannot listen on {path}: {error} (a socket's path has at most 107 bytes)") from None
    finally:
        os.umask(before)
    _share(path, group, 0o660)
    listener.listen()
    listener.settimeout(TICK_SECONDS)
    return listener


def _loop(listener: socket.socket, desk: Desk, token: str, idle_seconds: float) -> None:
    log.info("site %s is ready on %s", desk.site.name, desk.site.socket)
    busy = time.monotonic()
    while True:
        try:
            connection, _ = listener.accept()
        except TimeoutError:
            if desk.place is not None and time.monotonic() - busy > idle_seconds:
                desk.release()
            continue
        with connection:
            connection.settimeout(READ_SECONDS)
            _serve_one(connection, desk, token)
        busy = time.monotonic()


def _serve_one(connection: socket.socket, desk: Desk, token: str) -> None:
    try:
        parcel = receive(connection)
        facts = dict(parcel.facts)
        shown = facts.pop("token", "")
        if not hmac.compare_digest(str(shown).encode(), token.encode()):
            log.warning("a request without the token was refused")
            send(connection, Parcel({"error": "the token is wrong"}))
            return
        send(connection, desk.answer(Parcel(facts, parcel.payloads)))
    except (OSError, FedloomError) as error:
        log.warning("a caller was lost: %s", error)  # what was done is kept, and sent when it is asked for again


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stop
