"""The faults that befall real processes, and the hands that mend them after a while."""

from __future__ import annotations

import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from fedloom.deploy.certificates import certificate_pem, new_key, new_server, node_key_pair, read_certificate, read_key
from fedloom.flower import launch
from fedloom.flower.nodes import list_nodes, register_node, unregister_node
from fedloom.records.config import Config

if TYPE_CHECKING:
    from benchmarks.soak.processes import Federation

FAKETIME = [Path("/usr/lib") / machine / "faketime/libfaketime.so.1" for machine in
            ("x86_64-linux-gnu", "aarch64-linux-gnu")]  # fmt: skip
"""Where Debian's package libfaketime has its library."""
OTHER_VERSION = """
import sys
from fedloom.site import protocol
protocol.SPOKEN = protocol.Spoken(protocol.SPOKEN.newest + 1, protocol.SPOKEN.newest + 1)
from fedloom.cli.main import main
sys.argv = ["fedloom", "worker", sys.argv[1]]
main()
"""


class Hands:
    """Whoever looks after the machines: mends what is due, and starts nodes again that have ended, as systemd would."""

    def __init__(self, federation: Federation, config: Config, rng: random.Random) -> None:
        self.federation, self.config, self.rng = federation, config, rng
        self._due: list[tuple[float, Callable[[], None]]] = []
        self._slowed: dict[str, bool] = {}
        self.down: set[str] = set()

    def later(self, seconds: float, mend: Callable[[], None]) -> None:
        """Mend something after so long."""
        self._due.append((time.monotonic() + seconds, mend))

    def look_after(self) -> None:
        """Do what is due."""
        now = time.monotonic()
        due = [mend for when, mend in self._due if when <= now]
        self._due = [(when, mend) for when, mend in self._due if when > now]
        for mend in due:
            mend()
        for site, stopped in self._slowed.items():
            self.signal(f"worker-{site}", signal.SIGCONT if stopped else signal.SIGSTOP)
            self._slowed[site] = not stopped
        if "superlink" in self.federation.started:
            for site in self.federation.sites:
                process = self.federation.started.get(f"node-{site}")
                if site not in self.down and (process is None or process.poll() is not None):
                    self.federation.carrier(site)

    def mend_all(self) -> None:
        """Do all that would be due some time."""
        while self._due:
            self._due = [(0.0, mend) for _, mend in self._due]
            self.look_after()

    def signal(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a process and what it started."""
        process = self.federation.started.get(name)
        if process is not None:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)

    def slow(self, site: str, slowed: bool) -> None:
        """Have a worker stopped half of the time, or no more."""
        if slowed:
            self._slowed[site] = False
        else:
            self._slowed.pop(site, None)
            self.signal(f"worker-{site}", signal.SIGCONT)

    def restart_worker(self, site: str, *prefix: str, code: str = "") -> None:
        """Kill a worker and start it again, with another program in front of it, or by other code."""
        file = str(self.federation.folder / "fed/sites" / site / "SITE.toml")
        own = ["-c", code, file] if code else ["-m", "fedloom", "worker", file]
        self.federation.kill(f"worker-{site}")
        self.federation.start(f"worker-{site}", *prefix, sys.executable, *own)


def kill_worker(hands: Hands, site: str) -> str:
    """kill -9 of a worker."""
    hands.federation.kill(f"worker-{site}")
    hands.later(5.0, lambda: hands.restart_worker(site))
    return "back after 5 s"


def kill_node(hands: Hands, site: str) -> str:
    """kill -9 of a node."""
    hands.federation.kill(f"node-{site}")
    return "back when Flower lets it"


def kill_server(hands: Hands, site: str) -> str:
    """kill -9 of the server app."""
    app = hands.federation.serverapp()
    if app is None:
        return "it had ended"
    app.kill()
    return "run resumed"


def kill_superlink(hands: Hands, site: str) -> str:
    """kill -9 of the SuperLink and what it started."""
    hands.federation.kill("superlink")
    hands.later(5.0, hands.federation.superlink)
    return "back after 5 s, run resumed"


def stop_worker(hands: Hands, site: str) -> str:
    """SIGSTOP of a worker beyond the deadline."""
    return _stop(hands, f"worker-{site}")


def late_reply(hands: Hands, site: str) -> str:
    """SIGSTOP of a node beyond the deadline: what it was asked is answered late."""
    return _stop(hands, f"node-{site}")


def _stop(hands: Hands, name: str) -> str:
    seconds = 1.3 * hands.config.flower.deadline
    hands.signal(name, signal.SIGSTOP)
    hands.later(seconds, lambda: hands.signal(name, signal.SIGCONT))
    return f"for {seconds:.0f} s"


def slow_site(hands: Hands, site: str) -> str:
    """A worker that is stopped half of the time."""
    hands.slow(site, True)
    hands.later(30.0, lambda: hands.slow(site, False))
    return "half of the time, for 30 s"


def fill_site(hands: Hands, site: str) -> str:
    """A full disk at a site."""
    return _fill(hands, hands.federation.started[f"worker-{site}"].pid)


def fill_server(hands: Hands, site: str) -> str:
    """A full disk at the server app."""
    app = hands.federation.serverapp()
    return "it had ended" if app is None else _fill(hands, app.pid)


def _fill(hands: Hands, pid: int) -> str:
    room = hands.rng.randrange(0, 20000)

    def limit(size: int) -> None:
        with suppress(ProcessLookupError):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    limit(room)
    hands.later(25.0, lambda: limit(resource.RLIM_INFINITY))
    return f"no file grows over {room} bytes, for 25 s"


def cut_line(hands: Hands, site: str) -> str:
    """A line is cut."""
    line, seconds = hands.federation.lines[site], hands.rng.uniform(3.0, 60.0)
    line.cut = True

    def mend() -> None:
        line.cut = False

    hands.later(seconds, mend)
    return f"for {seconds:.0f} s"


def slow_line(hands: Hands, site: str) -> str:
    """A line of 64 kbit/s."""
    line = hands.federation.lines[site]
    line.rate = 8000.0

    def mend() -> None:
        line.rate = 0.0

    hands.later(40.0, mend)
    return "64 kbit/s for 40 s"


def bend_line(hands: Hands, site: str) -> str:
    """A bit of what passes next is changed; TLS notices."""
    hands.federation.lines[site].bend = True
    return "one bit"


def move_clock(hands: Hands, site: str) -> str:
    """The worker is started anew under a clock that is 30 hours ahead."""
    library = next((path for path in FAKETIME if path.exists()), None)
    if library is None:
        return "left out: Debian's package libfaketime is not installed"
    hands.restart_worker(site, "env", f"LD_PRELOAD={library}", "FAKETIME=+30h", "FAKETIME_DONT_FAKE_MONOTONIC=1")
    hands.later(30.0, lambda: hands.restart_worker(site))
    return "+30 hours, for 30 s"


def wrong_version(hands: Hands, site: str) -> str:
    """The worker is started anew as one of another protocol."""
    hands.restart_worker(site, code=OTHER_VERSION)
    hands.later(30.0, lambda: hands.restart_worker(site))
    return "a later protocol, for 30 s"


def revoke_key(hands: Hands, site: str) -> str:
    """The node is unregistered, and registered with a new key."""
    home = hands.federation.folder / "fed/sites" / site
    with launch.open_control(hands.config) as client:
        for node in list_nodes(client):
            if node.name == site and node.status != "unregistered":
                unregister_node(client, node.node_id)
    hands.down.add(site)

    def register() -> None:
        hands.federation.kill(f"node-{site}")
        private, public = node_key_pair(new_key())
        (home / "node.key").write_bytes(private)
        with launch.open_control(hands.config) as client:
            register_node(client, site, public)
        hands.down.discard(site)

    hands.later(15.0, register)
    return "a new key after 15 s"


def expire_certificate(hands: Hands, site: str) -> str:
    """The SuperLink comes back with a certificate that is over, and later with a good one."""
    fed = hands.federation.folder / "fed"
    ca, key = read_certificate(fed / "ca/ca.pem"), read_key(fed / "ca/ca.key")
    file = fed / "server/server.pem"
    good = file.read_bytes()
    hands.federation.kill("superlink")
    file.write_bytes(certificate_pem(new_server(read_key(fed / "server/server.key"), ["127.0.0.1"], ca, key, 0)))
    hands.federation.superlink()

    def renew() -> None:
        hands.federation.kill("superlink")
        file.write_bytes(good)
        hands.federation.superlink()

    hands.later(15.0, renew)
    return "renewed after 15 s, run resumed"


FAULTS: Mapping[str, Callable[[Hands, str], str]] = {
    "kill -9 of a worker": kill_worker,
    "kill -9 of a node": kill_node,
    "kill -9 of the server app": kill_server,
    "kill -9 of the SuperLink": kill_superlink,
    "worker stopped beyond the deadline": stop_worker,
    "late reply": late_reply,
    "slow site": slow_site,
    "full disk at a site": fill_site,
    "full disk at the server": fill_server,
    "line cut": cut_line,
    "slow line": slow_line,
    "bit changed on the line": bend_line,
    "clock moved": move_clock,
    "wrong version": wrong_version,
    "key revoked": revoke_key,
    "certificate expired": expire_certificate,
}
SERVERS = {"kill -9 of the server app", "kill -9 of the SuperLink", "full disk at the server", "certificate expired"}
"""Those that befall the server and not a site."""
