"""A federation of real processes on the loopback address, with TLS and node keys, for benches and tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeAlias

from fedloom.deploy import federation
from fedloom.errors import RoundError
from fedloom.flower import launch
from fedloom.flower.nodes import register_node
from fedloom.records.config import Config

WayIn: TypeAlias = Literal["node", "supernode"]
"""What carries messages at a site: `fedloom node`, or Flower's SuperNode with a ClientApp for every message."""
PATIENCE = 240.0
"""Seconds after which a process that does not come up is given up: many times what a busy machine needs."""


def until(condition: Callable[[], object], what: str, patience: float = PATIENCE) -> None:
    """Wait for a condition. Raises RoundError that names what was waited for."""
    end = time.monotonic() + patience
    while not condition():
        if time.monotonic() > end:
            raise RoundError(f"waited {patience:.0f} s for {what}")
        time.sleep(0.02)


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [int(listener.getsockname()[1]) for listener in held]
    for listener in held:
        listener.close()
    return ports


class Loopback:
    """Starts and ends what a federation consists of; only processes that it started itself.

    data: a site's examples, {site} standing for its name. `folder`/NAME.log is what each process said. The sites take
    the order of examples from the run's seed, so that payloads can be compared with the local engine's. way: what
    carries messages at the sites.
    """

    def __init__(self, folder: Path, sites: Sequence[str], model: Path, data: str, *, way: WayIn = "node") -> None:
        self.folder, self.sites, self.way = folder, sites, way
        self.port, *ports = free_ports(1 + len(sites))
        self.node_ports = dict(zip(sites, ports, strict=True))
        self.address = f"127.0.0.1:{self.port}"
        self.started: dict[str, subprocess.Popen[bytes]] = {}
        asked = federation.FederationPlan(address=self.address, listen=self.address, model=str(model), data=data)
        federation.write_federation(folder / "fed", asked, sites)
        for site in sites:
            file = folder / "fed/sites" / site / "SITE.toml"
            file.write_text(file.read_text().replace('order = "site"', 'order = "run" '))

    def overrides(self) -> list[str]:
        """Settings with which a run reaches this SuperLink."""
        return [f"flower.superlink={self.address}", f"flower.root_certificates={self.folder / 'fed/server/ca.pem'}"]

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a process in a session of its own, in the environment that Flower and fedloom need."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        source = str(Path(__file__).parents[1] / "src")
        environment = {**os.environ, **launch.QUIET, "PATH": path, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"}
        with self.log(name).open("a") as log:
            self.started[name] = subprocess.Popen(
                command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        return self.started[name]

    def log(self, name: str) -> Path:
        """What a process has said."""
        return self.folder / f"{name}.log"

    def superlink(self) -> None:
        """Start the SuperLink and wait until it listens."""
        self.start("superlink", str(self.folder / "fed/server/superlink.sh"))
        until(self.listening, "the SuperLink")

    def listening(self) -> bool:
        """Whether somebody listens on the SuperLink's port."""
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def carrier(self, site: str) -> subprocess.Popen[bytes]:
        """Start what carries messages at a site."""
        return self.supernode(site) if self.way == "supernode" else self.node(site)

    def node(self, site: str) -> subprocess.Popen[bytes]:
        """Start a site's `fedloom node`."""
        file = self.folder / "fed/sites" / site / "SITE.toml"
        return self.start(f"node-{site}", sys.executable, "-m", "fedloom", "node", str(file))

    def supernode(self, site: str, *options: str) -> subprocess.Popen[bytes]:
        """Start a site's SuperNode; `options` go to flower-supernode."""
        command = str(self.folder / "fed/sites" / site / "supernode.sh")
        return self.start(f"node-{site}", command, "--port", str(self.node_ports[site]), *options)

    def worker(self, site: str) -> subprocess.Popen[bytes]:
        """Start a site's worker."""
        file = self.folder / "fed/sites" / site / "SITE.toml"
        return self.start(f"worker-{site}", sys.executable, "-m", "fedloom", "worker", str(file))

    def everything(self, config: Config, registered: Sequence[str]) -> None:
        """Start all of it and let the `registered` sites in; `config` says how the SuperLink is reached."""
        for site in registered:
            self.worker(site)
        self.superlink()
        with launch.open_control(config) as client:
            for site in registered:
                register_node(client, site, (self.folder / f"fed/server/nodes/{site}.pub").read_bytes())
        for site in registered:
            self.carrier(site)

    def close(self) -> None:
        """End every process that was started, with its children."""
        for process in self.started.values():
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for process in self.started.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait(15)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
