"""A message over a line that breaks: what has arrived is not sent again, whatever Flower's client makes of the break.

Flower's client repeats a request that a cut swallowed. Two breaks it does not get over (flwr 1.41): one between
storing a piece and saying so, after which the SuperLink knows of no such piece to come; and a TLS connection that ends
without a word. Here both only cost what was under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import httpx
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    pull_and_inflate_object_from_tree,
    push_objects,
)

TRIES = 30
"""How often a message is begun again: a cut each, with Flower's own patience in between."""
PAUSE_SECONDS = 1.0

T = TypeVar("T")
Send = Callable[[Message, ObjectTree, float], tuple[set[str], str]]
"""Announces a message (with the seconds that it took): the ids of the pieces that are missing there, and a session."""
Pull = Callable[[int, str], bytes]
"""(run, object id) → its content."""
Push = Callable[[int, str, str, bytes], None]
"""Hands over (run, session, object id, content)."""


def pull_message(run: int, tree: ObjectTree, pull: Pull, confirm: Callable[[int, str], None]) -> Message:
    """The message whose pieces `tree` names; `confirm` tells the SuperLink once all are here.

    Raises httpx.TransportError where the line breaks `TRIES` times.
    """
    arrived: dict[str, bytes] = {}

    def piece(name: str) -> bytes:
        if name not in arrived:
            arrived[name] = pull(run, name)
        return arrived[name]

    def whole() -> Message:
        return pull_and_inflate_object_from_tree(tree, piece, partial(confirm, run), return_type=Message)

    return _insist(whole)


def push_message(message: Message, send: Send, push: Push, seconds: float = 0.0) -> None:
    """Hand an answer over, with the seconds that it took; of pieces that are there already nothing is sent.

    Raises httpx.TransportError or ObjectPushError where the line breaks `TRIES` times.
    """
    run, tree = message.metadata.run_id, get_object_tree(message)

    def missing() -> None:
        wanted, session = send(message, tree, seconds)
        objects = get_all_nested_objects(message)
        push_objects(objects, partial(push, run, session), object_ids_to_push=wanted)

    _insist(missing)


def _insist(act: Callable[[], T]) -> T:
    for _ in range(TRIES - 1):
        try:
            return act()
        except (ObjectPushError, httpx.TransportError):
            time.sleep(PAUSE_SECONDS)
    return act()
