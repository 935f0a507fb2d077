"""The sites of a simulation, as Ray's processes (actors) play them: any process may be any site, message by message.

What a site remembers is on disk alone (`site.store`), and read anew for every message; model and examples are loaded
once in a process, for all sites.
"""

from __future__ import annotations

import fcntl
import logging
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedloom.configfile import dump, parse
from fedloom.engines.flower.client import relay
from fedloom.setup import Setup, assemble, client_examples, participating
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import Parcel

log = logging.getLogger("fedloom.worker")
FORMAT = "%(asctime)s %(process)d %(levelname)s %(message)s"


@dataclass(frozen=True, slots=True)
class Sites:
    """All sites of a simulation, in the order of Flower's partitions. settings: what a run tells its sites."""

    settings: str
    sites: tuple[SiteConfig, ...]
    log: Path

    def app(self) -> ClientApp:
        """What Ray's processes are given."""
        app = ClientApp()
        app.train()(self.answer)
        app.query()(self.answer)
        return app

    def answer(self, message: Message, context: Context) -> Message:
        """The answer of the site whose node was asked."""
        told = Context(context.run_id, context.node_id, context.node_config, context.state, {"settings": self.settings})
        return relay(message, told, self.ask)

    def ask(self, parcel: Parcel, context: Context) -> Parcel:
        """The same, from its desk. Who asks while another process is being the same site waits for its turn."""
        site = self.sites[int(context.node_config["partition-id"])]
        with _locked(Path(site.state)):
            _log_to(self.log)
            desk = _desk(site)
            try:
                return desk.answer(parcel)
            finally:
                desk.close()


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter(FORMAT))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


@cache
def _desk(site: SiteConfig) -> Desk:
    return Desk(site, lambda config: _everybody(dump(config)))


@cache
def _everybody(settings: str) -> Setup:
    """Base model and examples of all sites, for settings as TOML."""
    config = parse(tomllib.loads(settings), "the run's settings")
    texts, _ = client_examples(config)
    setup = assemble(config, participating(texts, config.federation.participants), {})
    for text in setup.warnings():
        log.warning(text)
    return setup
