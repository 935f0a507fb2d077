"""`fedloom worker SITE.toml`: a long-lived process that holds a site's model and data and takes one request at a time.

It listens on a unix socket that only its own user may open, and answers only those who show the token. SuperNodes and
ClientApps may come and go; whoever asks while a request is being worked on waits for its turn. The worker outlives
every request, whatever is in it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType

from fedloom.errors import SiteError
from fedloom.garbage import collect_as_usual
from fedloom.model.patch import PatchedTrainer
from fedloom.records.quantities import parse_bytes
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.door import Door
from fedloom.site.gpu import claim_gpu
from fedloom.site.log_lines import OneLine
from fedloom.site.protocol import HEAD_SECONDS, SLOWEST, Parcel, error_parcel, receive_parcel, send_parcel
from fedloom.site.systemd import as_service

log = logging.getLogger("fedloom.worker")

TICK_SECONDS = 1.0
"""How long the worker waits for a caller before it looks at its other duties."""


class _Stop(BaseException):
    """The system asked the process to end."""


def serve_site(site: SiteConfig, own: PatchedTrainer | None = None) -> None:
    """Answer requests until the process is told to end. Raises SiteError where another worker serves this site.

    own: the site's own trainer, in place of fedloom's training.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    collect_as_usual()
    state = Path(site.state)
    state.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (state / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SiteError(f"another worker is using {state}; a site has one worker") from None
        before = signal.signal(signal.SIGTERM, _stop)
        try:
            _serve(site, own)
        except _Stop:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not disturb the leaving
            log.info("the worker ends")
        finally:
            # Also that of a worker that was killed before this one: the lock says that nobody serves there.
            Path(site.socket).unlink(missing_ok=True)
            signal.signal(signal.SIGTERM, before)


def _serve(site: SiteConfig, own: PatchedTrainer | None) -> None:
    """Answer requests, with the site's lock held. Raises _Stop where the process is told to end."""
    token = own_token(Path(site.token_file), site.socket_group)
    with _listening(Path(site.socket), site.socket_group) as listener:
        door = Door(listener, token)
        try:
            desk = Desk(claim_gpu(site), own=own)
            with as_service(f"site {site.name}"):
                _loop(door, desk, 60 * site.idle_minutes)
        finally:
            door.close()


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
    return listener


def _loop(door: Door, desk: Desk, idle_seconds: float) -> None:
    desk.wanted.look = partial(_take_withdrawals, door, desk)
    log.info("site %s is ready on %s", desk.site.name, desk.site.socket)
    while True:
        connection = door.next_caller(TICK_SECONDS)
        if connection is None:
            desk.release(idle_seconds)
            continue
        with connection:
            _serve_one(connection, desk, partial(desk.answer, waited=door.waited))


def _take_withdrawals(door: Door, desk: Desk) -> None:
    """Answer those who withdraw a turn, which the desk is training."""
    while (connection := door.next_urgent()) is not None:
        with connection:
            _serve_one(connection, desk, desk.wanted.answer)


def _serve_one(connection: socket.socket, desk: Desk, answer: Callable[[Parcel], Parcel] | None = None) -> None:
    """Answer a caller that has shown the token. Raises nothing but what ends the process."""
    try:
        _reply(connection, _answer(connection, desk, answer or desk.answer))
    except Exception as error:
        # What was done is kept, and sent when it is asked for again.
        log.warning("a caller was lost: %s", error, exc_info=not isinstance(error, OSError))


def _answer(connection: socket.socket, desk: Desk, answer: Callable[[Parcel], Parcel]) -> Parcel:
    try:
        most, folder = parse_bytes(desk.site.max_bytes_request), Path(desk.site.state)
        return answer(receive_parcel(connection, most, hurried=True, folder=folder).used_up())
    except (OSError, _Stop, KeyboardInterrupt, SystemExit):
        raise
    except SiteError as error:
        # It says what the caller sent, and what the site takes: nothing about data, and asking again would not help.
        log.warning("a request was refused: %s", error)
        return error_parcel(f"the site's worker refuses the request: {error}")
    except BaseException as error:  # a panic of a library in Rust is not an Exception
        log.error("a request failed: %s", error, exc_info=True)
        return error_parcel(f"the site could not take its turn: {type(error).__name__}")


def _reply(connection: socket.socket, parcel: Parcel) -> None:
    """Send it, to a caller that reads at `SLOWEST` at least: one that does not would keep all others waiting."""
    connection.settimeout(HEAD_SECONDS + sum(map(len, parcel.payloads)) / SLOWEST)
    send_parcel(connection, parcel)


def _stop(number: int, frame: FrameType | None) -> None:
    raise _Stop
