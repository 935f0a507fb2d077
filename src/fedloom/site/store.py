"""What a site remembers of a job, on disk before anything leaves: its state, its ledger, its last reply.

<state folder>/jobs/<job>/
  round-NNNNN.safetensors   the state before and after the last turn, and the reply to it
  ledger.jsonl              what this site received, trained and sent
  adapter/                  the result, once it was delivered

The state before a turn is kept because the server may not count the turn (it came too late, say): the residual that
the turn left behind is then taken back, and the next turn starts from the one before it.

The folder is made by the first `save`: nothing is left of a job that was refused before it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from fedloom.errors import CheckpointError, SiteError
from fedloom.methods.method import State
from fedloom.records.ledger import Ledger, Row, Taker
from fedloom.workspace.checkpoint import Contents, list_checkpoints, load_blob, load_contents, save_contents

LEDGER = "ledger.jsonl"


@dataclass(frozen=True, eq=False, slots=True)
class TurnRecord:
    """The state before and after the turn of `round` (0: none yet), and what was answered to it, facts and payload.

    charge: digest of the line in the audit record that charged for the payload's noise, "" without noise. left: bytes
    of a payload that was left on disk, where `Store.read_payload` finds it.
    """

    round: int
    before: State
    after: State
    facts: bytes = b""
    payload: bytes = b""
    charge: str = ""
    left: int = 0

    @property
    def payload_bytes(self) -> int:
        """The payload's size, wherever it is."""
        return len(self.payload) or self.left

    def without_payload(self) -> TurnRecord:
        """The same with the payload left on disk: it is asked for again only where a reply was lost."""
        return replace(self, payload=b"", left=self.payload_bytes)

    def size(self) -> int:
        """Bytes that this takes on disk, at most, but for names and the like."""
        held: dict[int, Tensor] = {}
        for state in (self.before, self.after):
            for part in state.shared:
                held |= {id(tensor): tensor for tensor in part.tensors().values()}
            held |= {id(tensor): tensor for tensor in state.memory.values()}
        return sum(tensor.nbytes for tensor in held.values()) + len(self.facts) + self.payload_bytes

    @property
    def room(self) -> int:
        """Bytes that are written with it: a payload is written once more, to the audit record."""
        return self.size() + self.payload_bytes

    def base(self, counted: int) -> State:
        """What the next turn starts from: the state after the last one if the server counted it."""
        return self.before if self.round > counted else self.after


class Store:
    """The folder of one job at one site. `seal` names what the job rests on: base weights and settings.

    most: bytes that one of its records has taken so far, or would have taken on a disk with room.
    """

    def __init__(self, folder: Path, seal: str) -> None:
        self.folder = folder
        self.seal = seal
        self.most = 0
        self._ledger: Ledger[Taker] | None = None

    def exists(self) -> bool:
        """Whether anything was saved of the job."""
        return bool(list_checkpoints(self.folder))

    def load(self) -> TurnRecord | None:
        """The record saved last without its payload, or None; the ledger is cut back to it.

        Raises SiteError where the seal differs.
        """
        saved = list_checkpoints(self.folder)
        if not saved:
            if (self.folder / LEDGER).exists():
                self._opened().truncate_to(0)
            return None
        held = load_contents(saved[-1], leave=("payload",))
        if held.facts["seal"] != self.seal:
            raise SiteError(f"{self.folder} belongs to the same job with another base model or other settings")
        self._opened().truncate_to(held.facts["ledger_rows"])
        record = TurnRecord(
            round=held.facts["round"],
            before=held.states["before"],
            after=held.states["after"],
            facts=held.blobs.get("facts", b""),
            charge=held.facts["charge"],
            left=held.left.get("payload", 0),
        )
        self.count_room(record)
        return record

    def read_payload(self) -> bytes:
        """The payload of the record saved last; b"" where there is none."""
        saved = list_checkpoints(self.folder)
        return load_blob(saved[-1], "payload") if saved else b""

    def count_room(self, held: TurnRecord) -> int:
        """Bytes that this record takes, or the largest so far, which the next one may take as well."""
        self.most = max(self.most, held.room)
        return self.most

    def save(self, held: TurnRecord, rows: Iterable[Row] = ()) -> None:
        """Have it on disk, whole, with these rows at the end of the ledger, or neither of the two.

        A first save that fails leaves nothing.
        """
        first, before = not self.folder.exists(), self._opened().rows
        try:
            self._write(held, rows)
        except BaseException:
            with suppress(OSError, CheckpointError):
                self.close() if first else self._opened().truncate_to(before)
            if first:
                shutil.rmtree(self.folder, ignore_errors=True)
            raise

    def _write(self, held: TurnRecord, rows: Iterable[Row]) -> None:
        ledger = self._opened()
        for row in rows:
            ledger.append(row)
        for later in list_checkpoints(self.folder):
            # A server that went back rounds ago asks anew for one that is over; the newest file counts.
            if int(later.stem.rpartition("-")[2]) > held.round:
                later.unlink()
        blobs = {"facts": held.facts, "payload": held.payload}
        facts = {"round": held.round, "seal": self.seal, "charge": held.charge, "ledger_rows": ledger.sync()}
        states = {"before": held.before, "after": held.after}
        kept = {name: blob for name, blob in blobs.items() if blob}
        save_contents(self.folder, held.round, Contents(states, kept, facts))

    def close(self) -> None:
        """Close the ledger."""
        ledger, self._ledger = self._ledger, None
        if ledger is not None:
            ledger.close()

    def _opened(self) -> Ledger[Taker]:
        if self._ledger is None:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._ledger = Ledger(self.folder / LEDGER)
        return self._ledger
