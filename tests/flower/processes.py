"""The loopback federation as tests use it: two sites, one stranger, and kill -9."""

from __future__ import annotations

import threading
from contextlib import suppress
from pathlib import Path

import psutil
from benchmarks.loopback import PATIENCE, Loopback, WayIn
from desks import TESTBED

from fedloom.flower import launch
from fedloom.records.config import Config
from fedloom.records.configfile import load_config

SITES = ("depot", "lab")
STRANGER = "stranger"


class Processes(Loopback):
    def __init__(self, folder: Path, way: WayIn = "node") -> None:
        super().__init__(folder, [*SITES, STRANGER], TESTBED / "model", str(TESTBED / "data" / "{site}"), way=way)

    def settings(self, rounds: int = 3, *more: str) -> Config:
        own = [
            f"federation.num_rounds={rounds}",
            "federation.eval_every=0",
            f"federation.participants={list(SITES)}",
            "training.max_steps=12",
            "output.keep_payloads=true",
            f"flower.deadline={PATIENCE}",
            "flower.min_replies=2",
            "data.heldout=null",
        ]
        return load_config(TESTBED / "demo.toml", [*own, *self.overrides(), *more])

    def said(self, name: str, words: str) -> int:
        """How often a process has said these words."""
        return self.log(name).read_text(errors="replace").count(words) if self.log(name).exists() else 0

    def submit(self, out: Path, *more: str, resume: bool = False, rounds: int = 3) -> list[object]:
        """Hand a run in from a thread; the list gets its end, a state or an error."""
        ended: list[object] = []

        def wait() -> None:
            try:
                ended.append(launch.run_on_superlink(self.settings(rounds, *more), out, resume=resume))
            except Exception as error:  # the test looks at it
                ended.append(error)

        threading.Thread(target=wait, daemon=True).start()
        return ended

    def kill(self, name: str) -> None:
        """kill -9, the process alone: what it started has to notice by itself."""
        process = self.started.pop(name)
        process.kill()
        process.wait(30)

    def stop(self, name: str) -> int:
        """Tell a process to end; its exit code."""
        process = self.started.pop(name)
        process.terminate()
        return process.wait(60)

    def child(self, name: str, words: str) -> psutil.Process | None:
        """The process that `name` started, directly or not, with these words in its command line."""
        for child in psutil.Process(self.started[name].pid).children(recursive=True):
            with suppress(psutil.Error):  # it has ended meanwhile
                if any(words in part for part in child.cmdline()):
                    return child
        return None
