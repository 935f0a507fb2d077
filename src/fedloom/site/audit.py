"""A site's own record of everything that has left it: the bytes themselves, and one chained line for each.

folder/
  audit.jsonl          one JSON object a payload, never changed after it is written
  payloads/<sha256>    the payload, as it left

A line names the digest of the line before it, so a line that was changed, taken out or put in shows. Someone who may
write to the folder could still cut lines off its end or write all of it anew: note the newest digest down elsewhere,
as `fedloom inspect` prints it. The line is on disk before the payload leaves; a payload that was recorded may have
failed to leave, none leaves unrecorded.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedloom.errors import AuditError
from fedloom.site.policy import Spent
from fedloom.site.privacy import epsilon

FIRST = "0" * 64
"""What the first line names as the one before it."""
DELTAS = (1e-5, 1e-6, 1e-9)
"""Where `summary` states ε."""


@dataclass(frozen=True, slots=True)
class Line:
    """One payload that left. time: UTC; payload: its SHA-256; mu: of its noise (`Privacy.mu`), None without noise."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)
    time: str
    job: str
    round: int
    bytes: int
    payload: str
    mu: float | None
    previous: str
    digest: str


_LINE: TypeAdapter[Line] = TypeAdapter(Line)


class AuditTrail:
    """The record in `folder`, which is made where it is missing."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "audit.jsonl"

    def record(self, payload: bytes, job: str, round: int, mu: float | None, now: datetime | None = None) -> Line:
        """Have the payload and its line on disk. Raises AuditError, and nothing may leave, where that is impossible."""
        try:
            (self.folder / "payloads").mkdir(parents=True, exist_ok=True, mode=0o700)
            name = hashlib.sha256(payload).hexdigest()
            kept = self.folder / "payloads" / name
            if not kept.exists():
                _write(kept, payload)
            with open(self.path, "ab+", opener=_private) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                lines = self.lines()
                file.truncate(sum(len(_dumped(line)) for line in lines))  # a line that a crash cut short
                line = _chained(now or datetime.now(UTC), job, round, len(payload), name, mu, lines)
                file.write(_dumped(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise AuditError(f"{self.folder}: what leaves cannot be recorded, so nothing leaves: {error}") from None
        return line

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

    def verify(self) -> tuple[list[Line], list[Line]]:
        """(all lines, those whose payload was moved away). Raises AuditError for a line or payload that was altered."""
        lines, moved = self.lines(), []
        for line in lines:
            kept = self.folder / "payloads" / line.payload
            if not kept.exists():
                moved.append(line)
            elif hashlib.sha256(kept.read_bytes()).hexdigest() != line.payload:
                raise AuditError(f"{kept} was altered after it left in round {line.round} of job {line.job}")
        return lines, moved

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
    """Σ μ² over the different payloads that carried noise."""
    return sum(mu * mu for mu in {line.payload: line.mu for line in lines}.values() if mu is not None)


def summary(lines: Sequence[Line], moved: Sequence[Line]) -> list[str]:
    """What a verified record amounts to, in words."""
    said = [f"{len(lines)} lines, unbroken; newest digest {lines[-1].digest if lines else FIRST} (note it elsewhere)"]
    if moved:
        said.append(f"{len(moved)} payloads are no longer in the folder: their bytes were not checked")
    mu, bare = math.sqrt(mu_squared(lines)), sum(line.mu is None for line in lines)
    if mu:
        values = ", ".join(f"{epsilon(mu, delta):.3g} at δ = {delta:g}" for delta in DELTAS)
        said.append(f"noise: μ = {mu:.4g} over all rounds and jobs together; ε = {values}")
    if bare:
        said.append(f"{bare} payloads left without noise: no ε can be claimed for what they were trained on")
    return said


def _chained(
    now: datetime, job: str, round: int, size: int, payload: str, mu: float | None, before: Sequence[Line]
) -> Line:
    previous = before[-1].digest if before else FIRST
    line = Line(now.isoformat(timespec="seconds"), job, round, size, payload, mu, previous, "")
    return Line(**{**asdict(line), "digest": _digest(line)})


def _digest(line: Line) -> str:
    """SHA-256 of all fields but the digest itself."""
    fields = {key: value for key, value in asdict(line).items() if key != "digest"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _dumped(line: Line) -> bytes:
    return json.dumps(asdict(line)).encode() + b"\n"


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
