"""What a site remembers of a job, on disk before anything leaves: its state, its ledger, its last reply.

<state folder>/jobs/<job>/
  round-NNNNN.safetensors   the state before and after the last turn, and the reply to it
  ledger.jsonl              what this site received, trained and sent
  adapter/                  the result, once it was delivered

The state before a turn is kept because the server may not count the turn (it came too late, say): the residual that
the turn left behind is then taken back, and the next turn starts from the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fedloom import checkpoint
from fedloom.checkpoint import Snapshot
from fedloom.errors import SiteError
from fedloom.ledger import Ledger
from fedloom.method import State


@dataclass(frozen=True, eq=False, slots=True)
class Held:
    """The state before and after the turn of `round` (0: none yet), and what was answered to it, facts and payload."""

    round: int
    before: State
    after: State
    facts: bytes = b""
    payload: bytes = b""

    def base(self, counted: int) -> State:
        """What the next turn starts from: the state after the last one if the server counted it."""
        return self.before if self.round > counted else self.after


class Store:
    """The folder of one job at one site. `seal` names what the job rests on: base weights and settings."""

    def __init__(self, folder: Path, seal: str) -> None:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.folder = folder
        self.seal = seal
        self.ledger = Ledger(folder / "ledger.jsonl")

    def load(self) -> Held | None:
        """What was saved last, the ledger cut back to it; None if nothing was. Raises SiteError for another seal."""
        saved = checkpoint.checkpoints(self.folder)
        snapshot = checkpoint.load(saved[-1]) if saved else None
        self.ledger.truncate_to(snapshot.ledger_rows if snapshot else 0)
        if snapshot is None:
            return None
        if snapshot.fingerprint != self.seal:
            raise SiteError(f"{self.folder} belongs to the same job with another base model or other settings")
        facts, payload = snapshot.archive.get(0, b""), snapshot.archive.get(1, b"")
        return Held(snapshot.round, snapshot.server, snapshot.clients["after"], facts, payload)

    def save(self, held: Held) -> None:
        """Have it on disk, whole, with the ledger's rows so far."""
        rows = self.ledger.sync()
        archive = {0: held.facts, 1: held.payload} if held.payload else {}
        checkpoint.save(self.folder, Snapshot(held.round, held.before, {"after": held.after}, archive, rows, self.seal))

    def close(self) -> None:
        """Close the ledger."""
        self.ledger.close()
