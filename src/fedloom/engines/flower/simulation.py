"""The Flower engine on this machine: Flower's Simulation Runtime, with Ray's processes as the sites.

    serve (this thread) ─→ Runtime ─→ Flower's runtime (a thread) ─→ Ray ─→ processes: actors.Sites ─→ desk

Flower would run the ServerApp in a thread of its own. Here that only hands its grid over and waits, so that the rounds
are played in the caller's thread, where errors and Ctrl-C arrive.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid as FlowerGrid
from flwr.serverapp import ServerApp
from pydantic import ValidationError

from fedloom.config import Config
from fedloom.configfile import explain
from fedloom.engines.flower.actors import Sites
from fedloom.engines.flower.fleet import Node
from fedloom.engines.flower.launch import quiet
from fedloom.engines.flower.server import serve
from fedloom.engines.flower.settings import check, shared
from fedloom.errors import ConfigError, RoundError
from fedloom.events import Observer
from fedloom.setup import client_examples, known, participating
from fedloom.site.config import SiteConfig
from fedloom.site.policy import Policy

STORE_BYTES = 256 * 2**20
"""Memory through which Ray hands messages over; what does not fit goes over files."""
PATIENCE = 5.0
"""Seconds that Flower's runtime may take to end by itself."""


def run(config: Config, out: Path, *, resume: bool = False, observer: Observer | None = None) -> None:
    """Play the run with processes of this machine as its sites; what a site holds is in `out`/sites/NAME.

    Without federation.participants all clients that there are data for take part. Raises ConfigError, DataError or
    ModelError for what the user can mend, RoundError where Ray fails.
    """
    config = with_participants(config)
    share = gpu_share(config)
    sites = sites_of(config, out.absolute() / "sites", "cuda" if share else "cpu")
    app = Sites(shared(config), sites, out.absolute() / "sites" / "worker.log").app()
    with Runtime(app, len(sites), backend(config, len(sites), share)) as runtime:
        serve(runtime, config, out, resume=resume, observer=observer)


def with_participants(config: Config) -> Config:
    """The settings with the name of everybody who takes part, checked like those of a real federation."""
    texts, _ = client_examples(config)
    known(config.clients, texts)
    names = tuple(participating(texts, config.federation.participants))
    federation = config.federation.model_copy(update={"participants": config.federation.participants or names})
    config = config.model_copy(update={"federation": federation})
    check(config)
    return config


def gpu_share(config: Config) -> float:
    """The share of a GPU for each process; 0 for none. Raises ConfigError where one is wanted that is not there."""
    there = torch.cuda.is_available()
    share = config.flower.sim_gpus
    if share and not there:
        raise ConfigError(f"flower.sim_gpus is {share:g}, but torch finds no GPU here: unset it, or set it to 0")
    return float(there and config.model.device != "cpu") if share is None else share


def sites_of(config: Config, folder: Path, device: str) -> tuple[SiteConfig, ...]:
    """What each site would say in its SITE.toml. Raises ConfigError where a client's name is none for a site."""
    try:
        return tuple(
            SiteConfig(
                name=name,
                model=config.model.path,
                data=config.data.source,
                device=device,
                state=str(folder / name),
                policy=Policy(scrub_errors=False),
            )
            for name in sorted(config.federation.participants or ())
        )
    except ValidationError as error:
        raise ConfigError(f"engine flower-sim: {explain(error)}") from None


def backend(config: Config, sites: int, share: float) -> dict[str, Any]:
    """How Flower is to start Ray: on this machine, reachable from nowhere else, silent."""
    cpus = config.flower.sim_cpus or os.cpu_count() or 1
    init = {
        "address": "local",  # and never a cluster that the environment names
        "_node_ip_address": "127.0.0.1",
        "num_cpus": min(cpus, sites),
        "num_gpus": torch.cuda.device_count() if share else 0,
        "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
        "log_to_driver": False,
        "logging_level": "CRITICAL",
    }
    # Flower gives these to Ray as the options of its actors; one that is killed is started anew.
    return {"init_args": init, "client_resources": {"num_cpus": 1, "num_gpus": share, "max_restarts": -1}}


class Runtime:
    """Flower's grid, and the runtime behind it: started when the grid is first looked at, ended with the context."""

    def __init__(self, app: ClientApp, sites: int, backend: dict[str, Any]) -> None:
        self.app = app
        self.sites = sites
        self.backend = backend
        self.grid: FlowerGrid | None = None
        self.failure: BaseException | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="flower-simulation", daemon=True)
        self._folder = tempfile.TemporaryDirectory(prefix="fedloom-", ignore_cleanup_errors=True)

    def get_nodes(self) -> Iterable[Node]:
        """The sites' nodes; none while Flower starts."""
        if self._thread.ident is None:
            self._thread.start()
        if self.grid is None and self._thread.is_alive():
            return ()
        return self._alive().get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send; the identifiers come back."""
        return self._alive().push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies that are there."""
        return self._alive().pull_messages(message_ids)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        if self._thread.ident is not None:
            self._end(0.0 if kind else PATIENCE)
        self._folder.cleanup()

    def _alive(self) -> FlowerGrid:
        if self.grid is None or not self._thread.is_alive():
            raise RoundError(f"Flower's Simulation Runtime has ended: {_root(self.failure)}")
        return self.grid

    def _run(self) -> None:
        from flwr.simulation import run_simulation

        server = ServerApp()

        @server.main()
        def hand_over(grid: FlowerGrid, context: Context) -> None:
            self.grid = grid
            self._over.wait()

        quiet()
        logging.getLogger("flwr").setLevel(logging.CRITICAL)
        self.backend["init_args"]["_temp_dir"] = self._folder.name
        try:
            run_simulation(server, self.app, self.sites, backend_config=self.backend)
        except BaseException as error:  # Flower ends a process where it gives up
            self.failure = error

    def _end(self, patience: float) -> None:
        """End the runtime; what is still being worked on after `patience` seconds is given up."""
        import ray

        self._thread.join(patience)
        while self._thread.is_alive():
            ray.shutdown()
            self._thread.join(1.0)


def _root(error: BaseException | None) -> str:
    """The first line of what an error began with."""
    while error is not None and error.__cause__ is not None:
        error = error.__cause__
    return (str(error).splitlines() or [type(error).__name__])[0] if error else "it gave no reason"
