"""Flower's messages without Flower's transport: each is handed to the relay, and its answer is there at once.

`simulate` plays a whole federation so, in one process and without Ray; benches measure fedloom's own part of a round.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedloom.config import Config
from fedloom.data import client_sources
from fedloom.engines.flower.client import Ask, relay
from fedloom.engines.flower.server import serve
from fedloom.engines.flower.settings import check, shared
from fedloom.errors import ConfigError
from fedloom.events import Observer
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import Parcel


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
        self.settings = shared(config)
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


def simulate(config: Config, out: Path, *, resume: bool = False, observer: Observer | None = None) -> None:
    """The Flower engine's run in this process: requests, policies' doors, state folders and messages are the real ones.

    Every site loads a base model of its own, and keeps its state in `out`/sites/NAME. Raises ConfigError where the data
    are not one file or folder a site.
    """
    check(config)
    if config.data.partitioner != "files":
        raise ConfigError('engine flower-sim needs data.partitioner = "files": every site reads its own data')
    sources = client_sources(config.data.source)
    names = sorted(config.federation.participants or ())
    missing = [name for name in names if name not in sources]
    if missing:
        raise ConfigError(f"federation.participants names {missing[0]!r}, which has no data in {config.data.source}")
    desks = {name: Desk(_site(config, name, sources[name], out / "sites" / name)) for name in names}
    with ExitStack() as stack:
        for desk in desks.values():
            stack.callback(desk.release)
        asks: dict[str, Ask] = {name: partial(_ask, desk) for name, desk in desks.items()}
        serve(DirectGrid(config, asks), config, out, resume=resume, observer=observer)


def _ask(desk: Desk, parcel: Parcel, context: Context) -> Parcel:
    return desk.answer(parcel)


def _site(config: Config, name: str, data: Path, folder: Path) -> SiteConfig:
    return SiteConfig(
        name=name,
        model=config.model.path,
        data=str(data),
        device=config.model.device,
        state=str(folder),
        socket=str(folder / "worker.sock"),
        token_file=str(folder / "worker.token"),
    )
