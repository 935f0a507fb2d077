"""Flower's messages without Flower's transport: each is handed to the relay, and its answer is there at once.

So benches measure fedloom's own part of a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedloom.flower.relay import Ask, relay
from fedloom.flower.settings import shared_settings
from fedloom.records.config import Config


@dataclass(frozen=True, slots=True)
class DirectNode:
    """A node that is always there."""

    node_id: int
    name: str
    status: str = "online"
    last_activated_at: str = ""


class DirectGrid:
    """sites: name → who answers for it. One message at a time."""

    def __init__(self, config: Config, sites: Mapping[str, Ask]) -> None:
        TaskIdentity.run_id, TaskIdentity.task_id, TaskIdentity.node_id = 1, 1, 1  # as Flower's runtime would
        self.nodes = [DirectNode(number, name) for number, name in enumerate(sites, start=2)]
        self.asks = dict(zip((node.node_id for node in self.nodes), sites.values(), strict=True))
        self.settings = shared_settings(config)
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
            context = Context(1, node, {}, RecordDict(), {"settings": self.settings})
            self.replies[identifier] = relay(message, context, self.asks[node])
            identifiers.append(identifier)
        return identifiers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The answers that were not fetched yet."""
        return [self.replies.pop(identifier) for identifier in message_ids if identifier in self.replies]
