"""Runs that a test writes row by row, as an engine would, and a server that shows them."""

import threading
from contextlib import contextmanager

from fedloom.records.ledger import Aggregation, Evaluation, Ledger, RunRow, Training, Transfer
from fedloom.records.lock import take_lock
from fedloom.records.session import End, Session
from fedloom.web.serving import Service

CLIENTS = ("ada", "bob")
DOMAINS = ("bank", "lab")


class WrittenRun:
    """A run in a folder, in progress until `end`: this process holds its lock."""

    def __init__(self, folder, method="fedsrd", rounds=4, clients=CLIENTS):
        folder.mkdir(parents=True)
        self.folder, self.round = folder, 0
        self._lock = take_lock(folder)
        (folder / "config.toml").write_text("", encoding="utf-8")
        self._ledger = None
        self._method, self._rounds, self._clients = method, rounds, clients

    def begin(self):
        """Its first rows; without them it is being set up."""
        self._ledger = Ledger(self.folder / "ledger.jsonl")
        parts = {"values": 600, "positions": 400}
        self._parts = parts
        self._write(RunRow(self._method, "model", self._clients, self._rounds, 1000, 0))
        self._write(Session(0, "2026-11-01T00:00:00+00:00", '[method]\nname = "fedsrd"\n'))
        self._write(*(Evaluation(0, domain, 0.0, 3.0, 0.1, 10, 30, 60) for domain in DOMAINS))
        self._ledger.sync()
        return self

    def play(self, rounds=1):
        """So many more rounds."""
        for _ in range(rounds):
            self.round += 1
            share = self.round / self._rounds
            for place, client in enumerate(self._clients):
                self._write(
                    Transfer(self.round, client, "down", "change", 900, {"values": 900}),
                    Training(self.round, client, 2.0 - share - place / 10, 3, 10, 0.5),
                    Transfer(self.round, client, "up", "update", 1000 + place, self._parts),
                )
            self._write(Aggregation(self.round, {}, 0.25))
            self._write(*(Evaluation(self.round, domain, share, 3.0 - share, 0.1, 10, 30, 60) for domain in DOMAINS))
        self._ledger.sync()
        return self

    def end(self, status="finished", reason=""):
        """Its last row; the lock is free."""
        self._write(End(self.round, status, reason, 12.5))
        self.close()
        return self

    def close(self):
        """Write no more, without a word: the lock is free."""
        if self._ledger is not None:
            self._ledger.close()
            self._ledger = None
        self._lock.close()

    def __del__(self):
        self.close()

    def _write(self, *rows):
        for row in rows:
            self._ledger.append(row)


@contextmanager
def served(*paths, **options):
    """A server for these folders at a free port, in a thread of this process."""
    service = Service(paths, port=0, **options)
    thread = threading.Thread(target=service.serve)
    thread.start()
    try:
        yield service
    finally:
        service.stop()
        thread.join(20)
    assert not thread.is_alive()
