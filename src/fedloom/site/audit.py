"""A site's own record of everything that has left it: the bytes themselves, and one chained line for each.

folder/
  audit.jsonl          one JSON object a payload or a draw of noise, never changed; its times never run backwards
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
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import BinaryIO

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedloom.errors import AuditError
from fedloom.noise.accounting import SampledNoise, merge
from fedloom.site.clock import Clock
from fedloom.site.rules import Spending

log = logging.getLogger("fedloom.worker")

FIRST = "0" * 64
"""What the first line names as the one before it."""


@dataclass(frozen=True, slots=True)
class Line:
    """One payload that left, or one draw of noise that was charged for.

    time: UTC; payload: its SHA-256, "" for a draw; mu: of the noise (`Privacy.mu`), None without noise; charge: digest
    of the line of the draw that the payload carries, None on other lines and on those of versions before that.
    sampled: the noise on single examples that is charged for; draw: which numbers it is made of
    (`model.private.PrivateRound.draw`); delta: the δ of its job at example level.
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
    sampled: SampledNoise | None = None
    draw: str | None = None
    delta: float | None = None
    summed: float | None = None


_LATER = ("charge", "sampled", "draw", "delta", "summed")
"""Fields that lines of older versions do not have; where they say nothing they are left out."""
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

    def charge(self, job: str, round: int, mu: float, now: datetime | None = None) -> Line:
        """Record on disk that noise is about to be drawn. Raises AuditError where that fails; then draw none."""
        return self._append(Line(self._time(now), job, round, 0, "", mu, "", ""))

    def charge_examples(
        self, job: str, round: int, sampled: SampledNoise, draw: str, delta: float, mu: float | None = None
    ) -> Line:
        """`charge` for noise on single examples, with `mu` for the noise of a whole site where there is both."""
        return self._append(Line(self._time(None), job, round, 0, "", mu, "", "", None, sampled, draw, delta))

    def find_charge(self, job: str, round: int, sampled: SampledNoise, draw: str, mu: float | None) -> Line | None:
        """The line that charged for this draw already, where nothing has left with it.

        A draw on examples is of the same numbers when a turn that was killed is trained again, and so it costs once;
        noise of a whole site is drawn anew every time.
        """
        lines, wanted = self.lines(), (job, round, draw, sampled, None)
        used = {line.charge for line in lines if line.payload}
        free = (line for line in lines if not line.payload and line.digest not in used)
        same = (line for line in free if (line.job, line.round, line.draw, line.sampled, line.mu) == wanted)
        return next(same, None) if mu is None else None

    def record(
        self,
        payload: bytes,
        job: str,
        round: int,
        mu: float | None,
        now: datetime | None = None,
        charge: str | None = None,
        summed: float | None = None,
    ) -> Line:
        """Have the payload and its line on disk. Raises AuditError, and nothing may leave, where that is impossible.

        charge: digest of the line that charged for the payload's noise. summed: what its share of noise in a secure sum
        leaves of it to be learnt, the ρ of concentrated privacy.
        """
        name = hashlib.sha256(payload).hexdigest()
        kept = self.folder / "payloads" / name
        try:
            kept.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            if not kept.exists():
                _write(kept, payload)
        except OSError as error:
            raise self._unrecorded(error) from None
        return self._append(Line(self._time(now), job, round, len(payload), name, mu, "", "", charge, summed=summed))

    def _append(self, line: Line) -> Line:
        """The line, chained to the last one and on disk."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with open(self.path, "ab+", opener=_private) as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                line = _chained(line, self._continue(file))
                file.write(_dumped(line))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise self._unrecorded(error) from None
        return line

    def _time(self, now: datetime | None) -> str:
        return (now or self.clock.now()).astimezone(UTC).isoformat(timespec="seconds")

    def _unrecorded(self, error: OSError) -> AuditError:
        return AuditError(f"{self.folder}: what leaves cannot be recorded, so nothing leaves: {error}")

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
            raise AuditError(f"{self.path}, line {number} is not a line of a record: {reason}") from None
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

    def payloads_of(self, job: str) -> dict[str, int]:
        """Digest → bytes of the payloads of a job that have left."""
        return {line.payload: line.bytes for line in self.lines() if line.job == job and line.payload}

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

    def count_spent(self, job: str, round: int, now: datetime | None = None) -> Spending:
        """What the policy counts. The same payload sent twice costs its bytes twice and its privacy once."""
        lines = self.lines()
        since = ((now or self.clock.now()) - timedelta(hours=24)).isoformat(timespec="seconds")
        return Spending(
            bytes_round=sum(line.bytes for line in lines if (line.job, line.round) == (job, round)),
            bytes_day=sum(line.bytes for line in lines if line.time > since),
            mu_squared=mu_squared(lines),
            sampled=sampled_noise(lines),
        )


def mu_squared(lines: Sequence[Line]) -> float:
    """Σ μ² over all draws of noise; where a record has no lines for them, over the different payloads with noise."""
    drawn = [line.mu for line in lines if not line.payload]
    older = {line.payload: line.mu for line in lines if line.payload and line.charge is None}
    return sum(mu * mu for mu in (*drawn, *older.values()) if mu is not None)


def sampled_noise(lines: Sequence[Line]) -> tuple[SampledNoise, ...]:
    """All noise on single examples that was charged for, steps of the same noise added up."""
    return merge(line.sampled for line in lines if line.sampled is not None and not line.payload)


def _chained(line: Line, before: Sequence[Line]) -> Line:
    """The line as it follows those before it."""
    time = line.time
    if before and time < before[-1].time:  # the clock was set back: a time that did would take bytes out of the day
        log.warning("the clock says %s, the record's last line %s: the line gets the later time", time, before[-1].time)
        time = before[-1].time
    line = replace(line, time=time, previous=before[-1].digest if before else FIRST)
    return replace(line, digest=_digest(line))


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


def _fields(line: Line) -> dict[str, object]:
    """What is written and digested. Lines of before there were charges have no such fields, and keep their digests."""
    return {key: value for key, value in asdict(line).items() if value is not None or key not in _LATER}


def _digest(line: Line) -> str:
    """SHA-256 of all fields but the digest itself."""
    fields = {key: value for key, value in _fields(line).items() if key != "digest"}
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


def _dumped(line: Line) -> bytes:
    return json.dumps(_fields(line)).encode() + b"\n"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _write(path: Path, content: bytes) -> None:
    """Write a file so that it is either complete on disk or absent."""
    partial = path.with_suffix(".partial")
    with open(partial, "wb", opener=_private) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
