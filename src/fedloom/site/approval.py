"""A site's book of jobs: what was asked of it, who allowed or refused it, and until when.

state folder/
  jobs.jsonl             one JSON object a line, never changed: asked, approved, refused, begun, done
  requests/<sha256>.toml the settings of each job, as the server wrote them

With `approve = "ask"` a job waits until a person at the site has allowed it. What is allowed is one job with these
very settings: under another name, or with other settings, it asks anew. The book is read at every request, so that a
decision counts at once; what a crash cut short is no line, and was reported to nobody. This module loads no torch.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fedloom.errors import ConfigError, PolicyRefusal, SiteError
from fedloom.site.protocol import Request

MOST_WAITING = 32
"""Jobs that may wait at the same time. A person can look at so many; a server could ask for any number."""
NOTES = 2**12
"""Bytes of a request's lines in the book and of the note on what the worker is at, at most."""
WAITS = "waits for a person at the site"
SHORT = 8
"""Hex digits by which settings are told apart in a name. Where that is not enough, more may be given."""
Event: TypeAlias = Literal["asked", "approved", "refused", "begun", "done"]
DECISIONS = ("approved", "refused")


@dataclass(frozen=True, slots=True)
class Line:
    """Something that happened to a job.

    time: UTC; settings: SHA-256 of the job's settings; base: digest of the base model that was asked for; who: the user
    who decided, with reason; rounds: updates that may leave in all; until: UTC, no training after that.
    """

    __pydantic_config__ = ConfigDict(extra="ignore", strict=True)
    time: str
    event: Event
    job: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    settings: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
    base: str = ""
    who: str = ""
    rounds: int | None = None
    until: str | None = None
    reason: str = ""


_LINE: TypeAdapter[Line] = TypeAdapter(Line)


@dataclass(frozen=True, slots=True)
class Job:
    """A job with its settings, and what happened to it. decision: the newest line of a person's, None while it waits.

    Times are UTC. begun, done: when the site first took part, when it received the result; "" before.
    """

    job: str
    settings: str
    base: str
    asked: str
    decision: Line | None = None
    begun: str = ""
    done: str = ""

    @property
    def name(self) -> str:
        """By which a person calls it: its number, and the beginning of its settings' digest."""
        return f"{self.job}-{self.settings[:SHORT]}"

    def standing(self, ask: bool, now: datetime) -> str:
        """In a word. ask: whether the site's policy has a person decide."""
        if self.decision is not None and self.decision.event == "refused":
            return "refused"
        if self.done:
            return "done"
        if self.decision is None:
            return "waiting" if ask else "begun" if self.begun else "asked"
        return "over" if _is_past(self.decision.until, now) else "approved"


class JobBook:
    """The book in a site's state folder. room(bytes) raises PolicyRefusal where no more may be written there."""

    def __init__(self, state: Path, *, ask: bool = False, room: Callable[[int], None] | None = None) -> None:
        self.path = state / "jobs.jsonl"
        self.requests = state / "requests"
        self.ask = ask
        self.room = room

    def check(self, asked: Request, now: datetime, *, delivery: bool = False) -> None:
        """Raises PolicyRefusal unless a person has allowed this job, or need not. A new one is written down as waiting.

        delivery: nothing leaves for it, so that an approval whose date is over still stands.
        """
        if not self.ask:
            return
        job = self.find(asked)
        if job is None:
            self.check_may_wait(asked)
            self.write_down(asked, now)
        if job is None or job.decision is None:
            name = name_of(asked)
            raise PolicyRefusal(
                f"job {name} {WAITS}: `fedloom site show {name}` says what it is, `fedloom site approve {name}` allows "
                f"it, `fedloom site refuse {name}` does not",
                WAITS,
            )
        said = job.decision
        if said.event == "refused":
            why = f": {said.reason}" if said.reason else ""
            raise PolicyRefusal(f"{said.who} refused job {job.name}{why}", f"refused by a person at the site{why}")
        if not delivery and _is_past(said.until, now):
            raise PolicyRefusal(
                f"job {job.name} was approved until {said.until}: `fedloom site approve {job.name}` allows it anew",
                f"the approval by a person at the site ended at {said.until}",
            )

    def check_updates(self, asked: Request, left: Collection[str], num_rounds: int) -> None:
        """Raises PolicyRefusal where as many updates of the job have left as were approved: its rounds, if no number
        was given. left: digests of its payloads; the same one again is no further update.
        """
        job = self.find(asked) if self.ask else None
        if job is None or job.decision is None:
            return
        most = num_rounds if job.decision.rounds is None else job.decision.rounds
        if len(left) >= most:
            raise PolicyRefusal(
                f"{len(left)} updates of job {job.name} have left, and {most} were approved: `fedloom site approve "
                f"{job.name} --rounds {most + num_rounds}` allows more",
                f"the approval by a person at the site was for {count_rounds(most)}, and that is over",
            )

    def check_may_wait(self, asked: Request) -> None:
        """Raises PolicyRefusal where too many jobs wait, or where there is no room for one more."""
        waiting = sum(job.decision is None and not job.begun for job in self.jobs())
        if waiting >= MOST_WAITING:
            raise PolicyRefusal(
                f"{waiting} jobs wait: `fedloom site jobs` lists them; refuse those that nobody wants",
                f"too many jobs wait for a person at the site ({waiting})",
            )
        if self.room:
            self.room(len(asked.settings.encode()) + NOTES)

    def write_down(self, asked: Request, now: datetime) -> None:
        """Keep the settings of a job, and the line that says who asked for what."""
        content = asked.settings.encode()
        kept = self.requests / f"{digest_of(asked)}.toml"
        if not kept.exists():
            self.requests.mkdir(parents=True, exist_ok=True, mode=0o700)
            partial = kept.with_suffix(".partial")
            with open(partial, "wb", opener=_private) as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, kept)
        self.append(Line(time_text(now), "asked", asked.job, digest_of(asked), asked.base))

    def note(self, event: Literal["begun", "done"], asked: Request, now: datetime) -> None:
        """Write down, once, that the site takes part in a job, or that it has received the result."""
        job = self.find(asked)
        if job is None:
            self.write_down(asked, now)
        if job is None or not getattr(job, event):
            self.append(Line(time_text(now), event, asked.job, digest_of(asked)))

    def decide(self, job: Job, decision: Line) -> Job:
        """Write a person's decision down. Raises SiteError where it cannot be."""
        try:
            self.append(decision)
        except OSError as error:
            raise SiteError(f"{self.path} cannot be written: {error.strerror}; run this as the worker's user") from None
        return next(each for each in self.jobs() if (each.job, each.settings) == (job.job, job.settings))

    def find(self, asked: Request) -> Job | None:
        """The job of a request, with the very settings that it brings; None if it was never written down."""
        wanted = (asked.job, digest_of(asked))
        return next((job for job in self.jobs() if (job.job, job.settings) == wanted), None)

    def named(self, name: str) -> Job:
        """The one job whose name begins like this. Raises ConfigError where there is none, or more than one."""
        found = [job for job in self.jobs() if f"{job.job}-{job.settings}".startswith(name) and name]
        if not found:
            raise ConfigError(f"no job {name!r} in {self.path}: `fedloom site jobs` lists them")
        if len(found) > 1:
            names = ", ".join(f"{job.job}-{job.settings[: SHORT + 8]}" for job in found[:9])
            raise ConfigError(f"{name!r} may be {len(found)} jobs: give more of the name; there are {names}")
        return found[0]

    def settings_of(self, job: Job) -> str:
        """The settings of a job, as the server wrote them. Raises SiteError where they are not what was asked for."""
        path = self.requests / f"{job.settings}.toml"
        try:
            content = path.read_bytes()
        except OSError as error:
            raise SiteError(f"the settings of job {job.name} cannot be read: {error}") from None
        if hashlib.sha256(content).hexdigest() != job.settings:
            raise SiteError(f"{path} was altered: it does not hold the settings of job {job.name}; refuse the job")
        return content.decode()

    def jobs(self) -> list[Job]:
        """All jobs, in the order in which they were asked for. Raises SiteError for a line that is none."""
        found: dict[tuple[str, str], Job] = {}
        for line in self._lines():
            key = (line.job, line.settings)
            found[key] = _after(found.get(key), line)
        return list(found.values())

    def _lines(self) -> Iterator[Line]:
        content = self.path.read_bytes() if self.path.exists() else b""
        for number, text in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
            try:
                yield _LINE.validate_json(text)
            except ValidationError as error:
                reason = error.errors()[0]["msg"]
                raise SiteError(
                    f"{self.path}, line {number} is not a line of a book of jobs: {reason}; nothing is allowed while "
                    "it stands there"
                ) from None

    def append(self, line: Line) -> None:
        """One more line, on disk. Raises OSError where that fails."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with open(self.path, "ab+", opener=_private) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            held = self.path.read_bytes()
            file.truncate(held.rfind(b"\n") + 1)  # the beginning of a line that a crash cut short
            file.write(_dumped(line))
            file.flush()
            os.fsync(file.fileno())
            _hand_over(file.fileno(), self.path.parent)


def count_rounds(number: int) -> str:
    """In words."""
    return f"{number} round{'s' if number > 1 else ''}"


def name_of(asked: Request) -> str:
    """`Job.name` of a request's job."""
    return f"{asked.job}-{digest_of(asked)[:SHORT]}"


def digest_of(asked: Request) -> str:
    """SHA-256 of a request's settings."""
    return hashlib.sha256(asked.settings.encode()).hexdigest()


def parse_until(text: str, now: datetime) -> datetime:
    """The end of the day that a date means here, or the very moment. Raises ConfigError for anything else, or the past.

    now: with a time zone.
    """
    try:
        until = datetime.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"--until {text}: expected a date such as 2027-01-31, or 2027-01-31T18:00") from None
    if len(text.strip()) <= len("2027-01-31"):
        until = until.replace(hour=23, minute=59, second=59)
    until = until.astimezone(UTC)  # without a zone it is meant here
    if until <= now:
        raise ConfigError(f"--until {text} is in the past")
    return until


def _after(job: Job | None, line: Line) -> Job:
    """What is known of a job after one more line."""
    job = job or Job(line.job, line.settings, line.base, line.time)
    return replace(
        job,
        decision=line if line.event in DECISIONS else job.decision,
        begun=line.time if line.event == "begun" else job.begun,
        done=line.time if line.event == "done" else job.done,
    )


def _is_past(until: str | None, now: datetime) -> bool:
    return until is not None and datetime.fromisoformat(until) <= now


def time_text(now: datetime) -> str:
    """UTC, to the second."""
    return now.astimezone(UTC).isoformat(timespec="seconds")


def _dumped(line: Line) -> bytes:
    said = {key: value for key, value in asdict(line).items() if value not in (None, "")}
    return json.dumps(said).encode() + b"\n"


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _hand_over(file: int, folder: Path) -> None:
    """Let the worker read what root has written: the file goes to the owner of the folder."""
    owner = folder.stat()
    if os.geteuid() == 0 and owner.st_uid:
        os.fchown(file, owner.st_uid, owner.st_gid)
