"""The way to a SuperLink, by Flower's own Fleet API and client: joining, pulling messages, handing answers over.

Flower's SuperNode takes messages the same way (flwr.supernode.fleet_http_connection, flwr 1.41). What it does beside
that is left out: it fetches the run's bundle and starts a process for the code in it. Here nothing of the server's is
executed; of a run its settings alone are read.

A SuperLink that is away is waited for. What waiting does not mend is a SiteError with what to do.
"""

from __future__ import annotations

import logging
import random
import threading
import time
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL, HEARTBEAT_PATIENCE
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto import fleet_pb2 as fleet
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.constant import VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.interceptors.http.utils import add_headers
from flwr.supercore.protobuf.client import ProtobufCall, ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedloom.errors import SiteError
from fedloom.flower.node.refusals import NotLetInError, explain_refusal
from fedloom.flower.proxies import explain_proxy
from fedloom.flower.transfer import pull_message, push_message
from fedloom.records.text import to_printable
from fedloom.site.config import NodeSettings

log = logging.getLogger("fedloom.node")

FIRST_PAUSE, LAST_PAUSE = 0.5, 15.0
"""Seconds before a SuperLink that is away is tried again: twice as long each time, and up to half of it less."""
BEAT_SECONDS = 2 / 3 * HEARTBEAT_DEFAULT_INTERVAL
FORGOTTEN_SECONDS = HEARTBEAT_PATIENCE * HEARTBEAT_DEFAULT_INTERVAL + 10.0
"""After so long the SuperLink has noticed that an earlier node with this key is gone, and lets the next one in."""

T = TypeVar("T")


class StoppedError(Exception):
    """The node was told to end while it waited for the SuperLink."""


class Link:
    """One site's way to its SuperLink. All methods may be called from several threads, but for `join` and `leave`.

    stop: set when the node is to end; nothing is waited for then.
    """

    def __init__(self, settings: NodeSettings, stop: threading.Event) -> None:
        self.settings, self.stop = settings, stop
        self.key = read_key(Path(settings.key))
        self.client = connect(settings, self.key)
        self.node = Node()
        self._runs: dict[int, str | None] = {}
        self._next_beat = 0.0
        self._away: float | None = None

    def join(self) -> None:
        """Have the SuperLink know that this site is there. Raises SiteError where it does not let it in."""
        until = time.monotonic() + FORGOTTEN_SECONDS
        waits = False
        while not self._activate():
            if time.monotonic() > until:
                raise NotLetInError(
                    "the SuperLink does not let this site in: either its key is not registered (the server's operator "
                    "runs `fedloom federation register`, and sees who is with `fedloom federation list`), or another "
                    "node with this key is running"
                )
            if not waits:
                log.warning("the SuperLink does not let this site in yet; trying for %.0f s", FORGOTTEN_SECONDS)
            waits = True
            self.stop.wait(2.0)
        log.info("connected to the SuperLink at %s", self.settings.superlink)

    def _activate(self) -> bool:
        """One try. Flower takes a node that was killed for running until its signs of life have been missing a while:
        so the last one of this site is signed off first.
        """
        kept = Path(self.settings.state) / "node-id"
        last = kept.read_text(encoding="utf-8") if kept.exists() else ""
        refusal = self._leave(int(last)) if last.isdecimal() else None
        asked = fleet.ActivateNodeRequest(
            public_key=public_key(self.key), heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL
        )
        try:
            self.node = Node(node_id=self.ask(self.client.ActivateNode, asked).node_id)
        except NotActivatedError:
            if isinstance(refusal, NotLetInError):  # it is not that an earlier node seems to run: the key is unknown
                raise refusal from None
            return False
        kept.write_text(str(self.node.node_id), encoding="utf-8")
        self._next_beat = time.monotonic() + BEAT_SECONDS
        return True

    def leave(self) -> None:
        """Tell the SuperLink that this site goes, if it is there to be told."""
        if self.node.node_id:
            self._leave(self.node.node_id)

    def _leave(self, node_id: int) -> SiteError | None:
        """What the SuperLink objects, where that tells something."""
        try:
            self.client.DeactivateNode(fleet.DeactivateNodeRequest(node_id=node_id))
        except httpx.HTTPStatusError as error:
            if error.response.status_code == HTTPStatus.UNAUTHORIZED:
                return explain_refusal(error, self.settings.superlink)
        except (httpx.HTTPError, ValueError) as error:
            log.debug("not signed off: %s", error)
        return None

    def beat(self) -> None:
        """Give a sign of life, if one is due."""
        if time.monotonic() < self._next_beat:
            return
        asked = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        if not self.ask(self.client.SendNodeHeartbeat, asked).success:
            raise NotLetInError("the SuperLink does not know this site any more: see `fedloom federation list` there")
        self._next_beat = time.monotonic() + BEAT_SECONDS

    def pull(self) -> tuple[Message, ObjectTree] | None:
        """The next message for this site, still without content, and the names of its pieces; None if there is none."""
        found = self.ask(self.client.PullMessages, fleet.PullMessagesRequest(node=self.node))
        if not found.messages_list:
            return None
        return message_from_proto(found.messages_list[0]), found.message_object_trees[0]

    def read(self, run: int, tree: ObjectTree, most: int) -> Message:
        """The message with its content. Raises SiteError where that is over `most` bytes."""
        arrived: dict[str, int] = {}

        def pull(run: int, name: str) -> bytes:
            ask = make_pull_object_fn_protobuf(lambda asked: self.ask(self.client.PullObject, asked), self.node, run)
            content = ask(name)
            arrived[name] = len(content)
            if sum(arrived.values()) > most:
                raise SiteError(f"a message of more than {most:,} bytes: max_bytes_request in SITE.toml may be raised")
            return content

        def confirm(run: int, name: str) -> None:
            ask = lambda asked: self.ask(self.client.ConfirmMessageReceived, asked)  # noqa: E731
            make_confirm_message_received_fn_protobuf(ask, self.node, run)(name)

        return pull_message(run, tree, pull, confirm)

    def hand_over(self, reply: Message, seconds: float) -> None:
        """Send an answer, which took so many seconds."""
        reply.metadata.__dict__["_message_id"] = reply.object_id

        def send(message: Message, tree: ObjectTree, took: float) -> tuple[set[str], str]:
            bare = remove_content_from_message(message) if message.has_content() else message
            asked = fleet.PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(bare)],
                message_object_trees=[tree],
                clientapp_runtime_list=[took],
            )
            told = self.ask(self.client.PushMessages, asked)
            return set(told.objects_to_push), told.session_id

        def push(run: int, session: str, name: str, content: bytes) -> None:
            ask = lambda asked: self.ask(self.client.PushObject, asked)  # noqa: E731
            make_push_object_fn_protobuf(ask, self.node, run, session)(name, content)

        push_message(reply, send, push, seconds)

    def settings_of(self, run: int) -> str | None:
        """A run's settings for its sites, as TOML; None where it was submitted by no fedloom, or by an older one."""
        if run not in self._runs:
            found = self.ask(self.client.GetRun, GetRunRequest(node=self.node, run_id=run)).run.override_config
            self._runs[run] = found["settings"].string if "settings" in found else None
            while len(self._runs) > 64:
                self._runs.pop(next(iter(self._runs)))
        return self._runs[run]

    def ask(self, call: Callable[[Any], T], request: object) -> T:
        """The SuperLink's answer, whenever it comes. Raises SiteError, RunOver or StoppedError where none will."""
        pause = FIRST_PAUSE
        while not self.stop.is_set():
            try:
                answer = call(request)
            except (httpx.TransportError, httpx.HTTPStatusError) as error:
                _check_activation(error)
                refusal = explain_refusal(error, self.settings.superlink)
                if refusal is not None:
                    raise refusal from None
                self._note_away(error)
                self.stop.wait(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, LAST_PAUSE)
            else:
                self._note_back()
                return answer
        raise StoppedError

    def _note_away(self, error: Exception) -> None:
        if self._away is None:
            self._away = time.monotonic()
            found, advice = explain_proxy(error, self.settings.superlink)
            if found:
                log.warning("%s; trying until there is a way: %s", to_printable(found), advice)
                return
            log.warning(
                "the SuperLink at %s is away (%s); trying until it is back",
                self.settings.superlink,
                to_printable(str(error) or type(error).__name__),
            )

    def _note_back(self) -> None:
        away, self._away = self._away, None
        if away is not None:
            log.info("the SuperLink is back after %.0f s", time.monotonic() - away)


class NotActivatedError(SiteError):
    """The SuperLink knows no node with this key, or takes it for running."""


def _check_activation(error: Exception) -> None:
    """Raises NotActivatedError for this one of Flower's errors."""
    if isinstance(error, httpx.HTTPStatusError):
        told = FlowerError.from_json(error.response.text)
        if told is not None and told.code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            raise NotActivatedError("not activated") from None


def read_key(path: Path) -> EllipticCurvePrivateKey:
    """The node's private key. Raises SiteError where there is none."""
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise SiteError(f"node.key: {path} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey):
        raise SiteError(f"node.key: {path} is no ECDSA key without a password, as `fedloom federation init` makes it")
    return key


def public_key(key: EllipticCurvePrivateKey) -> bytes:
    """The public part, as the SuperLink knows it."""
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    return public_key_to_bytes(key.public_key())


def connect(settings: NodeSettings, key: EllipticCurvePrivateKey) -> FleetHttpClient:
    """Flower's client of the Fleet API; nothing is sent yet. Raises SiteError where the CA's file is none."""
    try:
        certificates = Path(settings.root_certificates).read_bytes()
        return FleetHttpClient.from_server_address(
            settings.superlink,
            False,
            certificates,
            [_Versions(), NodeAuthHttpInterceptor(key, key.public_key())],
        )
    except OSError as error:  # ssl.SSLError is one
        raise SiteError(f"node.root_certificates: {settings.root_certificates} cannot be used: {error}") from None


class _Versions:
    """Tells the SuperLink this Flower's version, as Flower's own does; what it thinks of it is said once."""

    def __init__(self) -> None:
        self._metadata = RuntimeVersionMetadata.from_local_component("SuperNode")
        self._told = False

    def intercept(self, context: ProtobufRequestContext, call_next: ProtobufCall) -> httpx.Response:
        """Send it along."""
        add_headers(context.request, dict(self._metadata.as_metadata()))
        response = call_next(context)
        objection = response.headers.get(VERSION_INCOMPATIBILITY_MESSAGE_METADATA_KEY)
        if objection and not self._told:
            self._told = True
            log.warning(
                "the SuperLink lets this site in, but its Flower is of another version: install the server's flwr here "
                "(%s)",
                to_printable(objection),
            )
        return response
