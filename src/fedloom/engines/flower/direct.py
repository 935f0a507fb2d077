"""A grid without Flower's transport: every message goes straight to the relay and the worker behind it.

For measuring what fedloom's own part of a round costs. The relay, the socket and the worker are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedloom.config import Config
from fedloom.configfile import dump
from fedloom.engines.flower.client import relay


@dataclass(frozen=True, slots=True)
class DirectNode:
    """A node that is always there."""

    node_id: int
    name: str
    status: str = "online"
    last_activated_at: str = ""


class DirectGrid:
    """Site → folder with its worker.sock and worker.token. One message at a time."""

    def __init__(self, config: Config, places: Mapping[str, Path]) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # as Flower's runtime would
        self.nodes = [DirectNode(number, name) for number, name in enumerate(places, start=2)]
        self.configs = {
            number: {"worker-socket": str(place / "worker.sock"), "worker-token": str(place / "worker.token")}
            for number, place in enumerate(places.values(), start=2)
        }
        self.settings = dump(config)
        self.replies: dict[str, Message] = {}

    def get_nodes(self) -> Iterable[DirectNode]:
        """All nodes."""
        return self.nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Have each message answered at once."""
        identifiers = []
        for message in messages:
            identifier = message.object_id
            message.metadata.__dict__["_message_id"] = identifier
            node = message.metadata.dst_node_id
            context = Context(1, node, dict(self.configs[node]), RecordDict(), {"settings": self.settings})
            self.replies[identifier] = relay(message, context)
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that were not fetched yet."""
        return [self.replies.pop(identifier) for identifier in message_ids if identifier in self.replies]
