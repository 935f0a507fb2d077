"""A federation with a fault in every round, each kind once, ends by itself with the right bits and counts right."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("flwr", reason="the extra `flower` is not installed: pip install 'fedloom[flower]'")

from benchmarks.soak import report
from benchmarks.soak.checks import CHECKS, check_adapter
from benchmarks.soak.faults import FAULTS
from benchmarks.soak.play import Size, Soak, play, undisturbed
from benchmarks.soak.processes import Federation

pytestmark = pytest.mark.flower


@pytest.fixture(scope="module")
def soak(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Soak]:
    faults = random.Random(1).sample(sorted(FAULTS), len(FAULTS))
    yield play(Size(5, len(faults) + 1, 1, faults=faults), tmp_path_factory.mktemp("soak"))


def test_every_kind_of_fault_struck_once(soak: Soak):
    assert sorted(strike.fault for strike in soak.strikes) == sorted(FAULTS) and len(FAULTS) >= 12


def test_the_adapter_is_that_of_the_same_attendance_undisturbed(soak: Soak):
    assert list(check_adapter(soak, undisturbed(soak))) == []


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_what_holds_at_the_end(soak: Soak, check):
    assert list(check(soak)) == []


def test_the_page_tells_every_round(soak: Soak):
    text = report.page(report.describe(soak, {name: list(check(soak)) for name, check in CHECKS.items()}))
    assert all(f"| {round} | " in text for round in range(1, len(FAULTS) + 2))
    assert all(text.count(f"| {fault} |") == 2 for fault in FAULTS), "once in each table"


def test_checks_find_what_is_wrong(soak: Soak):
    """An attendance that was, bytes that the ledger lacks, and a file that was left."""
    (soak.run / "left.partial").touch()
    soak.link.sent.append(soak.link.sent[-1])
    soak.trainings[soak.size.names[0], 1] += 9
    soak.strikes.clear()
    found = {name: list(check(soak)) for name, check in CHECKS.items()}
    for name in (
        "who was undisturbed was counted",
        "every turn counted once",
        "every byte counted once",
        "nothing left behind",
    ):
        assert found[name], name


def test_a_worker_that_still_starts_is_waited_for_before_it_is_told_to_end(tmp_path: Path):
    """Told before it holds its site, it leaves the socket of the one that was killed before it."""
    (tmp_path / "fed/sites/a").mkdir(parents=True)
    federation = Federation.__new__(Federation)
    federation.folder, federation.sites = tmp_path, ["a", "b", "c"]
    lives, ended = SimpleNamespace(poll=lambda: None), SimpleNamespace(poll=lambda: 2)
    federation.started = {"worker-a": lives, "worker-b": ended}
    path = str(tmp_path / "fed/sites/a/worker.sock")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as killed:
        killed.bind(path)
    assert not federation.is_settled("a") and federation.is_settled("b") and federation.is_settled("c")
    heard = []

    def serve() -> None:
        time.sleep(0.1)
        Path(path).unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(path)
            listener.listen()
            heard.append(listener.accept()[0].close())

    worker = threading.Thread(target=serve)
    worker.start()
    federation.settle()
    worker.join()
    assert heard == [None]
