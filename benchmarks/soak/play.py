"""One soak in one process: the real rounds and desks over the made-up link, with somebody who restarts what ended."""

from __future__ import annotations

import gc
import logging
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from benchmarks.soak.faults import AFTER_SESSION, FAULTS, SERVERS, Hand, Strike
from benchmarks.soak.machine import Killed, Machine, Machines
from benchmarks.soak.replay import replay
from benchmarks.soak.superlink import Link, SimNode
from benchmarks.soak.timeline import Timeline
from benchmarks.soak.toy import ToySetup, assemble
from fedloom.errors import FedloomError
from fedloom.flower import sites as server
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.events import RunSummary
from fedloom.records.ledger import Roll, Row, read_rows
from fedloom.records.session import End
from fedloom.site.config import SiteConfig
from fedloom.site.rules import Policy
from fedloom.testbeds import testbed_folder
from fedloom.workspace.export import export_adapter, save_run_adapter

DEADLINE = 30.0
"""Seconds of simulated time: a dozen turns."""
SETTLE = 200.0
"""Simulated seconds after the end, in which every fault ends and what is still under way arrives."""


@dataclass(frozen=True)
class Size:
    """How large a soak is. faults: their names, one a round; None draws them."""

    sites: int = 20
    rounds: int = 50
    seed: int = 0
    method: str = "fedsrd"
    faults: Sequence[str] | None = None

    @property
    def names(self) -> list[str]:
        """The sites' names."""
        return [f"site-{number:02d}" for number in range(1, self.sites + 1)]

    def plan(self) -> list[str]:
        """The fault of every round: all of them in a drawn order, again and again; the last round is left in peace."""
        if self.faults is not None:
            return list(self.faults)
        rng, drawn = random.Random(self.seed), list[str]()
        while len(drawn) < self.rounds - 1:
            drawn += rng.sample(sorted(FAULTS), len(FAULTS))
        return drawn[: self.rounds - 1]


@dataclass(eq=False)
class Soak:
    """A soak that was played. trainings: (site, round) → training steps; ends: how each session of the server ended."""

    size: Size
    config: Config
    folder: Path
    link: Link
    strikes: list[Strike] = field(default_factory=list)
    ends: list[str] = field(default_factory=list)
    trainings: Counter[tuple[str, int]] = field(default_factory=Counter)
    finished: bool = False
    seconds: float = 0.0
    open_files: int = 0

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "server" / "run"

    @property
    def nodes(self) -> list[SimNode]:
        """All nodes."""
        return sorted(self.link.nodes.values(), key=lambda node: node.site.name)

    @property
    def timeline(self) -> Timeline:
        """The simulated time."""
        return self.link.machines.timeline


def settings(size: Size) -> Config:
    """The demo's settings for this many sites and rounds, without examples to score."""
    own = [
        f"federation.num_rounds={size.rounds}",
        f"federation.participants={size.names}",
        f"method.name={size.method}",
        f"flower.deadline={DEADLINE}",
        f"flower.min_replies={max(1, size.sites // 2)}",
        "data.heldout=null",
        "output.keep_payloads=true",
    ]
    return load_config(testbed_folder() / "demo.toml", own)


def play(size: Size, folder: Path) -> Soak:
    """Play it. Whatever ends a session of the server is noted, and the run resumed, as an operator would."""
    config, rng = settings(size), random.Random(size.seed + 1)
    machines = Machines(Timeline(), Machine("server", folder / "server"))
    plan = size.plan()

    def opened(round: int) -> None:
        if round <= len(plan):
            arm(soak, round, plan[round - 1], rng)

    link = Link(machines, rng, opened)
    soak = Soak(size, config, folder, link)
    examples = folder / "examples.jsonl"
    examples.write_text('{"instruction": "a", "output": "b"}\n', encoding="utf-8")
    (folder / "server").mkdir()
    for number, name in enumerate(size.names, start=101):
        link.nodes[number] = SimNode(link, number, site_config(name, folder), config, random.Random(rng.random()))
    began, opened_before = machines.timeline.now, count_open()
    with simulated(machines, soak):
        operate(soak)
        soak.seconds = machines.timeline.now - began
        machines.timeline.advance(SETTLE)
        for node in soak.nodes:
            node.kill_worker()
    gc.collect()
    soak.open_files = count_open() - opened_before
    return soak


def count_open() -> int:
    """Files that this process has open."""
    return len(os.listdir("/proc/self/fd"))


def site_config(name: str, folder: Path) -> SiteConfig:
    """A site; its examples come in the run's order, so that bytes can be compared with the replay's."""
    return SiteConfig(
        name=name,
        model=str(testbed_folder() / "model"),
        data=str(folder / "examples.jsonl"),
        device="cpu",
        state=str(folder / "sites" / name),
        socket=str(folder / f"{name}.sock"),
        token_file=str(folder / f"{name}.token"),
        policy=Policy(order="run"),
    )


def operate(soak: Soak) -> None:
    """Start the run, and resume it until it has ended by itself or was started more often than there are faults."""
    machines, resume = soak.link.machines, False
    for _ in range(soak.size.rounds + 3):
        soak.link.begin_session()
        try:
            server.run_federation(soak.link, soak.config, soak.run, resume=resume, number=1)
            soak.finished = True
            return
        except Killed:
            machines.server.thaw()
            soak.ends.append("killed")
        except (FedloomError, OSError) as error:
            soak.ends.append(f"{type(error).__name__}: {error}")
        machines.server.kill_in = None
        machines.timeline.advance(max(AFTER_SESSION.values()))
        machines.server.room = None
        machines.apply()
        resume = (soak.run / "ledger.jsonl").exists()


def arm(soak: Soak, round: int, fault: str, rng: random.Random) -> None:
    """Have a fault strike at a random moment of the round that has just begun."""
    site = "" if fault in SERVERS else rng.choice(soak.size.names)
    strike = Strike(round, fault, site, soak.timeline.now)
    soak.strikes.append(strike)
    node = next(node for node in soak.nodes if node.site.name == (site or soak.size.names[0]))

    def hit() -> None:
        strike.begins = soak.timeline.now
        strike.told = FAULTS[fault](Hand(soak.link, node, rng, strike))

    soak.timeline.after(rng.uniform(0.0, 6.0), hit)


@contextmanager
def simulated(machines: Machines, soak: Soak) -> Iterator[None]:
    """The made-up model at the server, every training counted, the exports without pictures, no worker's log."""

    def told(site: str, round: int) -> None:
        soak.trainings[site, round] += 1

    with (
        machines.simulated(),
        mock.patch.object(server, "build_setup", lambda config, *rest, **more: assemble(config)),
        mock.patch("fedloom.server.loop.finish_run", finish_run),
        mock.patch.object(ToySetup, "told", staticmethod(told)),
        mock.patch.object(logging.getLogger("fedloom.worker"), "disabled", True),
    ):
        yield


def undisturbed(soak: Soak) -> Path:
    """The run's folder of the same attendance without faults."""
    out = soak.folder / "undisturbed"
    with mock.patch("fedloom.server.loop.finish_run", finish_run):
        return replay(assemble(soak.config), soak.config, out, attendance(read_rows(soak.run / "ledger.jsonl")))


def attendance(rows: Sequence[Row]) -> dict[int, tuple[str, ...]]:
    """Round → whose updates were averaged. A round that was played again after a crash counts as it was last."""
    return {row.round: row.answered for row in rows if isinstance(row, Roll)}


def finish_run(setup: Any, folder: Any, state: Any, rounds: int, seconds: float) -> RunSummary:  # noqa: ANN401
    """Stands for `workspace.export.finish_run`, without report and picture."""
    adapter, lost = export_adapter(state, None)
    save_run_adapter(adapter, setup.config.model.path, setup.adapter, folder.path / "adapter")
    folder.ledger.append(End(rounds, "finished", "", seconds, lost))
    folder.ledger.sync()
    return RunSummary(folder.path, setup.job.method.name, rounds, {}, {}, 0, 0, seconds, lost, "", ())
