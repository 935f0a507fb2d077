"""A site's own record of everything that has left it: the bytes themselves, and one chained line for each.

folder/
  audit.jsonl          one JSON object a payload or a draw of noise, never changed after it is written
  payloads/<sha256>    the payload, as it left

A line names the digest of the line before it, so a line that was changed, taken out or put in shows. Someone who may
write to the folder could still cut lines off its end or write all of it anew: note the newest digest down elsewhere,
as `fedloom inspect` prints it. The line is on disk before the payload leaves; a payload that was recorded may have
failed to leave, none leaves unrecorded. Noise is charged for before it is drawn, by a line of its own that the line of
the payload names: whatever becomes of the draw afterwards, it is counted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedloom.errors import AuditError
from fedloom.site.privacy import epsilon
from fedloom.site.rules import Spent

FIRST = "0" * 64
"""What the first line names as the one before it."""
DELTAS = (1e-5, 1e-6, 1e-9)
"""Where `summary` states ε."""


@dataclass(frozen=True, slots=True)
class Line:
    """One payload that left, or one draw of noise that was charged for.

    time: UTC; payload: its SHA-256, "" for a draw; mu: of the noise (`Privacy.mu`), None without noise; charge: digest
    of the line of the draw that the payload carries, None on other lines and on those of versions before that.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    time: str
    job: str
    round: int
    bytes: int
    payload: str
    mu: float | None
    previous: str
    digest: str
    charge: str | None = None


_LINE: TypeAdapter[Line] = TypeAdapter(Line)


class AuditTrail:
    """The record in `folder`, which is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "audit.jsonl"

    def charge(self, job: str, round: int, mu: float, now: datetime | None = None) -> Line:
        """Have it on disk that noise is about to be drawn. Raises AuditError, and none may be, where it cannot be."""
        return self._append(now, Line("", job, round, 0, "", mu, "", ""))

    def record(
        self,
        payload: bytes,
        job: str,
        round: int,
        mu: float | None,
        now: datetime | None = None,
        charge: str | None = None,
    ) -> Line:
        """Have the payload and its line on disk. Raises AuditError, and nothing may leave, where that is impossible.

        charge: digest of the line that charged for the payload's noise.
        """
        name = hashlib.sha256(payload).hexdigest()
        kept = self.folder / "payloads" / name
        try:
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not kept.exists():
                _write(kept, payload)
        except OSError as error:
            raise self._unrecorded(error) from None
        return self._append(now, Line("", job, round, len(payload), name, mu, "", "", charge))

    def _append(self, now: datetime | None, line: Line) -> Line:
        """The line with its time, chained to the last one and on disk."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(self.path, "ab+", opener=_private) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                lines = self.lines()
                file.truncate(sum(len(_dumped(line)) for line in lines))  # a line that a crash cut short
                line = _chained(now or datetime.now(UTC), line, lines)
                file.write(_dumped(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unrecorded(error) from None
        return line

    def _unrecorded(self, error: OSError) -> AuditError:
        return AuditError(f"{self.folder}: what leaves cannot be recorded, so nothing leaves: {error}")

    def lines(self) -> list[Line]:
        """All lines, oldest first, without one that a crash cut short. Raises AuditError where the chain is broken."""
        if not self.path.exists():
            return []
        lines: list[Line] = []
        for number, text in enumerate(self.path.read_bytes().split(b"\n")[:-1], start=1):
            try:
                line = _LINE.validate_json(text)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise AuditError(f"{self.path}, line {number} is no line of a record: {reason}") from None
            if line.previous != (lines[-1].digest if lines else FIRST) or line.digest != _digest(line):
                raise AuditError(f"{self.path}: line {number} was altered, or a line before it was taken out or put in")
            lines.append(line)
        return lines

    def verify(self) -> tuple[list[Line], list[Line], list[str]]:
        """(all lines, those whose payload was moved away, payload files without a line).

        A file without a line was about to leave when its line could not be written, or its line was taken out. Raises
        AuditError for a line or payload that was altered, or for a payload whose noise was not charged.
        """
        lines, moved = self.lines(), []
        _check_charges(self.path, lines)
        folder, named = self.folder / "payloads", {line.payload for line in lines}
        unlisted = sorted(path.name for path in folder.glob("*") if path.name not in named and not path.suffix)
        for line in lines:
            if not line.payload:
                continue
            kept = self.folder / "payloads" / line.payload
            if not kept.exists():
                moved.append(line)
            elif hashlib.sha256(kept.read_bytes()).hexdigest() != line.payload:
                raise AuditError(f"{kept} was altered after it left in round {line.round} of job {line.job}")
        return lines, moved, unlisted

    def spent(self, job: str, round: int, now: datetime | None = None) -> Spent:
        """What the policy counts. The same payload sent twice costs its bytes twice and its privacy once."""
        lines = self.lines()
        since = ((now or datetime.now(UTC)) - timedelta(hours=24)).isoformat(timespec="seconds")
        return Spent(
            bytes_round=sum(line.bytes for line in lines if (line.job, line.round) == (job, round)),
            bytes_day=sum(line.bytes for line in lines if line.time > since),
            mu_squared=mu_squared(lines),
        )


def mu_squared(lines: Sequence[Line]) -> float:
    """Σ μ² over all draws of noise; where a record has no lines for them, over the different payloads with noise."""
    drawn = [line.mu for line in lines if not line.payload]
    older = {line.payload: line.mu for line in lines if line.payload and line.charge is None}
    return sum(mu * mu for mu in (*drawn, *older.values()) if mu is not None)


def summary(lines: Sequence[Line], moved: Sequence[Line], unlisted: Sequence[str] = ()) -> list[str]:
    """What a verified record amounts to, in words."""
    said = [f"{len(lines)} lines, unbroken; newest digest {lines[-1].digest if lines else FIRST} (note it elsewhere)"]
    if unlisted:
        said.append(
            f"{len(unlisted)} payloads have no line, {unlisted[0]} for one: they could not be recorded and did not "
            "leave, or their lines were cut off"
        )
    if moved:
        said.append(f"{len(moved)} payloads are no longer in the folder: their bytes were not checked")
    mu, bare = math.sqrt(mu_squared(lines)), sum(line.mu is None for line in lines)
    if mu:
        values = ", ".join(f"{epsilon(mu, delta):.3g} at δ = {delta:g}" for delta in DELTAS)
        said.append(f"noise: μ = {mu:.4g} over all rounds and jobs together; ε = {values}")
    if bare:
        said.append(f"{bare} payloads left without noise: no ε can be claimed for what they were trained on")
    return said


def _check_charges(path: Path, lines: Sequence[Line]) -> None:
    """Raises AuditError unless each charge that a payload names was made before it, for it alone."""
    charges: dict[str, tuple[str, int, float | None]] = {}
    used: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        what = (line.job, line.round, line.mu)
        if not line.payload:
            charges[line.digest] = what
        elif line.charge is not None and (
            charges.get(line.charge) != what or used.setdefault(line.charge, line.payload) != line.payload
        ):
            raise AuditError(f"{path}: line {number} names a charge for noise that was not made for this payload")


def _chained(now: datetime, line: Line, before: Sequence[Line]) -> Line:
    previous = before[-1].digest if before else FIRST
    line = replace(line, time=now.isoformat(timespec="seconds"), previous=previous)
    return replace(line, digest=_digest(line))


def _fields(line: Line) -> dict[str, object]:
    """What is written and digested. Lines of before there were charges have no such field, and keep their digests."""
    return {key: value for key, value in asdict(line).items() if (key, value) != ("charge", None)}


def _digest(line: Line) -> str:
    """SHA-256 of all fields but the digest itself."""
    fields = {key: value for key, value in _fields(line).items() if key != "digest"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _dumped(line: Line) -> bytes:
    return json.dumps(_fields(line)).encode() + b"\n"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(path: Path, content: bytes) -> None:
    """The file is whole and on disk, or not there."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb", opener=_private) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
