"""`fedloom node SITE.toml`: pulls a site's messages from the SuperLink, has the worker answer them, sends the answers.

It goes on pulling while the worker trains, so that a withdrawal reaches the worker at once. Requests wait for one
another here; whatever is in them, nothing of the server's is executed. What the worker has answered is on its disk: a
node may be killed at any moment, and the server asks again.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Protocol

from flwr.app import Error, Message
from flwr.common.constant import ErrorCode
from flwr.proto.message_pb2 import ObjectTree

from fedloom.errors import ConfigError, SiteError
from fedloom.flower.launch import QUIET
from fedloom.flower.node.line import Line, Waiting
from fedloom.flower.node.link import Link, StoppedError
from fedloom.flower.node.refusals import RunOver
from fedloom.flower.payload import pack_parcel, unpack_parcel
from fedloom.flower.proxies import exempt_loopback
from fedloom.garbage import collect_as_usual
from fedloom.records.quantities import parse_bytes
from fedloom.site.calling import call_worker
from fedloom.site.config import SiteConfig
from fedloom.site.log_lines import OneLine
from fedloom.site.protocol import MOST_HEAD, SPOKEN, Parcel, error_parcel, parse_request
from fedloom.site.systemd import as_service

log = logging.getLogger("fedloom.node")

FIRST_PAUSE, LAST_PAUSE = 0.2, 2.0
PATIENT = 1 / 30
"""Between two looks for messages: this part of the time that nothing has come, within the two bounds. So nobody waits
long, measured by what they have waited already, and a federation at rest costs little."""
BUSY_PAUSE = 1.0
"""The same while the worker is at a request: nothing but a withdrawal could go on before that."""
MOST_MESSAGES = 32
"""Messages that are worked on or wait: a run has two at once here. More are left at the SuperLink."""
REPEAT_SECONDS = 0.5
"""Between two tries to withdraw a turn from the worker, which may not have begun it yet."""
WITHDRAW_SECONDS = 5.0
"""How long a worker may be away for a withdrawal: one that was killed trains no more."""
LEAVE_SECONDS = 1.0
"""How long a SuperLink may take to be told that this node goes."""
FOREIGN = (
    "this site takes messages of fedloom alone, and runs no code of a run (`fedloom node`): submit the run with "
    "`fedloom run --engine flower`"
)


class Way(Protocol):
    """What a node needs of a `Link`."""

    def beat(self) -> None:
        """Give a sign of life, if one is due."""

    def pull(self) -> tuple[Message, ObjectTree] | None:
        """The next message, without content."""

    def read(self, run: int, tree: ObjectTree, most: int) -> Message:
        """The message with its content."""

    def hand_over(self, reply: Message, seconds: float) -> None:
        """Send an answer."""

    def settings_of(self, run: int) -> str | None:
        """A run's settings."""


class _Ended(BaseException):
    """The system asked the process to end."""


def serve_node(site: SiteConfig) -> None:
    """Carry messages until the process is told to end. Raises SiteError where it cannot go on without somebody's help.

    Must be called from the main thread: it takes SIGTERM and SIGINT.
    """
    if site.node is None:
        raise ConfigError('SITE.toml has no [node]: add it, with superlink = "host:port"')
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    collect_as_usual()
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every request
    os.environ.update(QUIET)
    exempt_loopback()
    stop = threading.Event()
    link = Link(site.node, stop)
    worker = partial(call_worker, path=Path(site.socket), token=Path(site.token_file))
    node = Carrier(link, worker, parse_bytes(site.max_bytes_request), stop)
    with _alone(Path(site.node.state)):
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, _end)
        try:
            link.join()
            with as_service(f"site {site.name} at {site.node.superlink}"):
                node.carry()
        except _Ended:
            log.info("the node ends")
        finally:
            stop.set()
            leaving = threading.Thread(target=link.leave, daemon=True)
            leaving.start()
            leaving.join(LEAVE_SECONDS)


class _alone:
    """Holds the lock of the node's folder. Raises SiteError where another node of this site does."""

    def __init__(self, state: Path) -> None:
        self.state = state

    def __enter__(self) -> None:
        try:
            self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._file = (self.state / "node.lock").open("w")
        except OSError as error:
            raise SiteError(f"node.state: {self.state} cannot be written: {error.strerror}") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise SiteError(f"another node is using {self.state}; a site has one node") from None

    def __exit__(self, *error: object) -> None:
        self._file.close()


def _end(number: int, frame: FrameType | None) -> None:
    for handled in (signal.SIGTERM, signal.SIGINT):  # a second one must not disturb the leaving
        signal.signal(handled, signal.SIG_IGN)
    raise _Ended


class Carrier:
    """Carries messages between a SuperLink and a worker. ask_worker(request, patience=…) → its reply.

    most: bytes of payloads that a request may bring. stop: set when the node ends.
    """

    def __init__(self, way: Way, ask_worker: Callable[..., Parcel], most: int, stop: threading.Event) -> None:
        self.way, self.ask_worker, self.most, self.stop = way, ask_worker, most, stop
        self.line = Line()
        self._wake = threading.Event()
        self._at_work: set[threading.Thread] = set()
        self._heard = time.monotonic()

    def carry(self) -> None:
        """Until `stop`. Raises SiteError where the SuperLink does not take this site any more."""
        while not self.stop.is_set():
            self.way.beat()
            pulled = self.way.pull() if len(self._at_work) < MOST_MESSAGES else None
            if pulled is None:
                self._wake.wait(self.pause())
                self._wake.clear()
            else:
                self.take(*pulled)

    def pause(self) -> float:
        """Seconds until the next look for a message."""
        quiet = time.monotonic() - self._heard
        return max(BUSY_PAUSE if len(self.line) else FIRST_PAUSE, min(LAST_PAUSE, quiet * PATIENT))

    def take(self, message: Message, tree: ObjectTree) -> threading.Thread:
        """Work on a message, in a thread of its own."""
        self._heard = time.monotonic()
        thread = threading.Thread(target=self._work, args=(message, tree), daemon=True)
        self._at_work.add(thread)
        thread.start()
        return thread

    def _work(self, message: Message, tree: ObjectTree) -> None:
        """Raises nothing: what goes wrong with one message is no reason to leave the others."""
        run, began = message.metadata.run_id, time.monotonic()
        try:
            reply = self.answer(message, tree)
            if reply is not None:
                self.way.hand_over(reply, time.monotonic() - began)
        except RunOver:
            log.info("run %d is over: a message of it is dropped", run)
        except StoppedError:
            pass  # the server asks again
        except SiteError as error:
            log.error("a message of run %d was not answered: %s", run, error)
        except Exception:
            log.exception("a message of run %d was not answered", run)
        finally:
            self._at_work.discard(threading.current_thread())
            self._heard = time.monotonic()
            self._wake.set()

    def answer(self, message: Message, tree: ObjectTree) -> Message | None:
        """The answer to a message. None where nobody waits for it any more."""
        try:
            whole = self.way.read(message.metadata.run_id, tree, self.most + 2 * MOST_HEAD)
            parcel = unpack_parcel(whole.content)
        except SiteError as error:
            log.warning("a message was refused: %s", error)
            reason = FOREIGN if "none of fedloom's" in str(error) else f"the site's node: {error}"
            return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)
        began = time.perf_counter()
        reply = self._ask(parcel, message)
        if message.metadata.created_at + message.metadata.ttl <= time.time():
            return None
        facts = {**reply.facts, "relay": time.perf_counter() - began}
        return Message(pack_parcel(Parcel(facts, reply.payloads)), reply_to=message)

    def _ask(self, parcel: Parcel, message: Message) -> Parcel:
        """The worker's reply, or an error in its place, in our own words."""
        try:
            settings = self.way.settings_of(message.metadata.run_id)
            if settings is None:
                raise SiteError(
                    "the run does not tell its settings as `fedloom node` reads them: update the server's fedloom, or "
                    "start supernode.sh here until then"
                )
            parcel = Parcel({**parcel.facts, "settings": settings}, parcel.payloads)
            asked = parse_request(parcel.facts)
            if asked.ask == "withdraw":
                return self.withdraw(parcel, asked.job, asked.round)
            request = Waiting(asked.ask, asked.job, asked.round)
            if asked.expires is not None:
                # A clock may be a little off, and only so much: Flower refuses a site whose clock is wrong.
                age = max(0.0, time.time() - message.metadata.created_at)
                request.until = time.monotonic() + asked.expires - age
            return self.ask_in_turn(request, parcel)
        except SiteError as error:
            return error_parcel(f"the site's node: {error}")

    def ask_in_turn(self, request: Waiting, parcel: Parcel) -> Parcel:
        """The worker's reply, after those who came before."""
        why = self.line.enter(request)
        if why is not None:
            log.info("%s of job %s, round %d was dropped: %s", request.ask, request.job, request.round, why)
            return Parcel({"dropped": why, "protocol": SPOKEN.newest})
        try:
            if "expires" in parcel.facts:
                parcel = Parcel({**parcel.facts, "expires": max(0.0, request.left)}, parcel.payloads)
            return self.ask_worker(parcel)
        finally:
            self.line.leave(request)

    def withdraw(self, parcel: Parcel, job: str, round: int) -> Parcel:
        """Nobody wants a turn any more. Returns once it is not worked on: then the server may ask for another.

        Also where none is known here the worker is told: it may still train for a node that was killed.
        """
        turn = self.line.withdraw(job, round)
        while True:
            try:
                said = self.ask_worker(parcel, patience=WITHDRAW_SECONDS)
            except SiteError as error:
                log.warning("a withdrawal did not reach the worker: %s", error)
                said = error_parcel("the worker is away")
            if turn is None or self.line.wait_for(turn, REPEAT_SECONDS) or self.stop.is_set():
                return said if turn is None else Parcel({"protocol": SPOKEN.newest})
