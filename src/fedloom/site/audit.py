"""A site's own record of everything that has left it: the bytes themselves, and one chained line for each.

folder/
  audit.jsonl          one JSON object a payload, never changed after it is written; its times never run backwards
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
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedloom.errors import AuditError
from fedloom.site.clock import Clock
from fedloom.site.policy import Spent
from fedloom.site.privacy import epsilon

log = logging.getLogger("fedloom.worker")

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


@dataclass(frozen=True, slots=True)
class Extent:
    """Lines that were checked, the place in the file where they end, and the SHA-256 of all bytes before it."""

    lines: tuple[Line, ...] = ()
    end: int = 0
    seal: bytes = hashlib.sha256().digest()


class AuditTrail:
    """The record in `folder`, which is made where it is missing.

    A line is parsed and checked once. After that a digest tells whether the bytes of all checked lines are still the
    same, in a small part of the time; if they are not, all of them are checked again.
    """

    def __init__(self, folder: Path, clock: Clock | None = None) -> None:
        self.folder = folder
        self.path = folder / "audit.jsonl"
        self.clock = clock or Clock()
        self._checked = Extent()

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
                lines = self._continue(file)
                line = _chained(now or self.clock.now(), job, round, len(payload), name, mu, lines)
                file.write(_dumped(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise AuditError(f"{self.folder}: what leaves cannot be recorded, so nothing leaves: {error}") from None
        return line

    def lines(self) -> list[Line]:
        """All lines, oldest first, without one that a crash cut short. Raises AuditError where the chain is broken."""
        return list(self._read()[0])

    def _read(self) -> tuple[tuple[Line, ...], bytes, bytes]:
        """(all lines, the bytes that hold them, those of a line that a crash cut short)."""
        content = self.path.read_bytes() if self.path.exists() else b""
        known = self._checked
        hashed = hashlib.sha256(memoryview(content)[: known.end])
        if len(content) < known.end or hashed.digest() != known.seal:
            known, hashed = Extent(), hashlib.sha256()  # somebody else wrote there: all of it is checked again
        lines, end = list(known.lines), content.rfind(b"\n") + 1
        for text in content[known.end : end].split(b"\n")[:-1]:
            lines.append(self._line(text, lines))
        hashed.update(memoryview(content)[known.end : end])
        self._checked = Extent(tuple(lines), end, hashed.digest())
        # A crash leaves the beginning of a line, and what it was for has not left. With its end but no newline it is a
        # line like all others, or one that was altered: it would be easy to take a charge back otherwise.
        if b"}" in content[end:]:
            return (*lines, self._line(content[end:], lines)), content, b""
        return tuple(lines), content[:end], content[end:]

    def _line(self, text: bytes, before: Sequence[Line]) -> Line:
        """The line that follows those `before` it. Raises AuditError where it is none, or does not follow."""
        number = len(before) + 1
        try:
            line = _LINE.validate_json(text)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise AuditError(f"{self.path}, line {number} is no line of a record: {reason}") from None
        if line.previous != (before[-1].digest if before else FIRST) or line.digest != _digest(line):
            raise AuditError(f"{self.path}: line {number} was altered, or a line before it was taken out or put in")
        return line

    def _continue(self, file: BinaryIO) -> tuple[Line, ...]:
        """All lines, and the file ready for one more after the last of them, wherever that ends in the file."""
        lines, held, short = self._read()
        if short:
            log.warning("%s: a line that was cut short is taken off: %r", self.path, short[:200])
        file.truncate(len(held))
        if held and not held.endswith(b"\n"):
            file.write(b"\n")
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
        since = ((now or self.clock.now()) - timedelta(hours=24)).isoformat(timespec="seconds")
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
    time = now.astimezone(UTC).isoformat(timespec="seconds")
    if before and time < before[-1].time:  # the clock was set back: a time that did would take bytes out of the day
        log.warning("the clock says %s, the record's last line %s: the line gets the later time", time, before[-1].time)
        time = before[-1].time
    line = Line(time, job, round, size, payload, mu, previous, "")
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
