"""The soak with real processes: SuperLink, server app, nodes and workers over TLS, each site behind a line of its own.

A fault strikes in every round but the last; the others are those of `play`, but for those that TLS makes impossible.
Real time passes: a fault takes some tens of seconds.
"""

from __future__ import annotations

import random
import socket
import tempfile
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from benchmarks.loopback import Loopback, until
from benchmarks.soak.line import Line
from benchmarks.soak.play import Size, attendance
from benchmarks.soak.realchecks import check_all
from benchmarks.soak.realfaults import FAULTS, Hands
from benchmarks.soak.replay import replay
from fedloom.errors import FedloomError
from fedloom.flower import launch
from fedloom.records.config import Config
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Roll, Transfer, read_rows
from fedloom.testbeds import testbed_folder
from fedloom.workspace.assemble import load_setup

DEADLINE = 45.0
"""Seconds of a round: a turn over real processes takes about ten on a busy machine."""
EXAMPLES = 16
"""Of every site."""
PATIENCE = 2400.0
"""Seconds after which a soak that does not end is given up."""


class Federation(Loopback):
    """A loopback federation whose nodes reach the SuperLink by lines that can be cut."""

    def __init__(self, folder: Path, sites: list[str]) -> None:
        testbed = testbed_folder()
        domains = sorted(path for path in (testbed / "data").glob("*/train.jsonl"))
        for number, site in enumerate(sites):
            rows = domains[number % len(domains)].read_text(encoding="utf-8").splitlines(keepends=True)
            (folder / "data" / site).mkdir(parents=True)
            (folder / "data" / site / "train.jsonl").write_text("".join(rows[:EXAMPLES]), encoding="utf-8")
        super().__init__(folder, sites, testbed / "model", str(folder / "data" / "{site}"))
        self.lines = {site: Line(self.port) for site in sites}
        for site, line in self.lines.items():
            file = folder / "fed/sites" / site / "SITE.toml"
            text = file.read_text(encoding="utf-8").replace(self.address, f"127.0.0.1:{line.port}")
            file.write_text(text, encoding="utf-8")

    def serverapp(self) -> psutil.Process | None:
        """The server app of the run that goes on, if one does."""
        process = self.started.get("superlink")
        with suppress(psutil.Error):
            for child in psutil.Process(process.pid).children(recursive=True) if process else ():
                with suppress(psutil.Error):
                    if any("flwr-serverapp" in part for part in child.cmdline()):
                        return child
        return None

    def kill(self, name: str) -> None:
        """kill -9 of a process, with what it started."""
        process = self.started.pop(name, None)
        if process is not None:
            with suppress(psutil.Error):
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
            process.kill()
            process.wait(30)

    def settle(self) -> None:
        """Wait until every worker that was started takes calls, or has ended.

        One that is told to end while it still loads its libraries has no hold of its site yet, and leaves there what a
        worker left that was killed before it. That is no fault: the next worker clears it away.
        """
        for site in self.sites:
            until(partial(self.is_settled, site), f"the worker of {site}")

    def is_settled(self, site: str) -> bool:
        """Whether a site's worker takes calls, or there is none."""
        process = self.started.get(f"worker-{site}")
        if process is None or process.poll() is not None:
            return True
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as caller:
            return caller.connect_ex(str(self.folder / "fed/sites" / site / "worker.sock")) == 0

    def close(self) -> None:
        """End everything."""
        super().close()
        for line in self.lines.values():
            line.close()


def settings(federation: Federation, size: Size) -> Config:
    """The demo's settings, two steps a turn."""
    own = [
        f"federation.num_rounds={size.rounds}",
        "federation.eval_every=0",
        f"federation.participants={size.names}",
        f"method.name={size.method}",
        "training.max_steps=2",
        "output.keep_payloads=true",
        f"flower.deadline={DEADLINE}",
        f"flower.min_replies={max(1, size.sites // 2)}",
        f"data.source={federation.folder / 'data' / '{client}'}",
        "data.heldout=null",
    ]
    return load_config(testbed_folder() / "demo.toml", [*own, *federation.overrides()])


def run(size: Size, folder: Path | None = None) -> dict[str, Any]:
    """Play it and check it. folder: where it is left; otherwise nothing is."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            return run(size, Path(place))
    folder.mkdir(exist_ok=True)
    began = time.monotonic()
    federation = Federation(folder, size.names)
    told: list[dict[str, Any]] = []
    ends: list[str] = []
    with federation:
        config = settings(federation, size)
        federation.everything(config, size.names)
        finished = operate(federation, config, size, told, ends)
        federation.settle()
    out = folder / "run"
    rows = read_rows(out / "ledger.jsonl")
    undisturbed = folder / "undisturbed"
    if finished:
        replay(load_setup(config), config, undisturbed, attendance(rows))
    rolls = {row.round: row for row in rows if isinstance(row, Roll)}
    return {
        "size": {"sites": size.sites, "rounds": size.rounds, "seed": size.seed, "method": size.method},
        "seconds": round(time.monotonic() - began),
        "ends": ends,
        "checks": check_all(federation, size, out, undisturbed, told, ends, finished),
        "rounds": [
            {**one, "answered": len(rolls[one["round"]].answered), "failed": dict(rolls[one["round"]].failed)}
            for one in told
            if one["round"] in rolls
        ],
    }


def operate(federation: Federation, config: Config, size: Size, told: list[dict[str, Any]], ends: list[str]) -> bool:
    """Submit, strike once a round, submit again what ended early. Returns whether the run finished by itself."""
    rng, out = random.Random(size.seed), federation.folder / "run"
    plan = list(size.faults or ())
    while len(plan) < size.rounds - 1:
        plan += rng.sample(sorted(FAULTS), len(FAULTS))
    hands = Hands(federation, config, rng)
    until_then, struck, resume = time.monotonic() + PATIENCE, 0, False
    while time.monotonic() < until_then and len(ends) <= size.rounds:
        ended: list[object] = []
        threading.Thread(target=_submit, args=(config, out, resume, ended), daemon=True).start()
        while not ended and time.monotonic() < until_then:
            time.sleep(0.5)
            hands.look_after()
            round = begun(out)
            if round > struck and round < size.rounds:
                struck, fault, site = round, plan[round - 1], rng.choice(size.names)
                told.append({"round": round, "fault": fault, "site": site, "told": FAULTS[fault](hands, site)})
                print(f"round {round}: {fault}, {site}", flush=True)
        if ended and isinstance(ended[0], launch.RunState):
            hands.mend_all()
            return True
        ends.append(str(ended[0]) if ended else "it did not end")
        print(f"ended: {ends[-1]}", flush=True)
        hands.mend_all()
        resume = (out / "checkpoints").exists()
        until(federation.listening, "the SuperLink")
        until(lambda: federation.serverapp() is None, "the server app's end")
    return False


def begun(out: Path) -> int:
    """The round whose first turn was sent."""
    with suppress(FedloomError):
        return max((row.round for row in read_rows(out / "ledger.jsonl") if isinstance(row, Transfer)), default=0)
    return 0


def _submit(config: Config, out: Path, resume: bool, ended: list[object]) -> None:
    try:
        ended.append(launch.run_on_superlink(config, out, resume=resume))
    except Exception as error:
        ended.append(error)
