"""The circumstances of a run, from its ledger alone: when and where, how it ended, who held what, what it answered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedloom.records.ledger import Row, Training
from fedloom.records.session import Answer, End, Session

LINES = {"10 Mbit/s": 10e6, "1 Mbit/s": 1e6, "256 kbit/s": 256e3}
"""Lines that people have: a household's upload, a slow office's, a site at the end of the world; bits a second."""


@dataclass(frozen=True, slots=True)
class Circumstances:
    """sessions: in order; end: None while the run goes on; examples: client → those it said it holds, the last time.

    answers: (domain, prompt) → (what was expected, answer by round).
    """

    sessions: tuple[Session, ...] = ()
    end: End | None = None
    examples: Mapping[str, int] = field(default_factory=dict)
    answers: Mapping[tuple[str, str], tuple[str, Mapping[int, str]]] = field(default_factory=dict)


def gather_facts(rows: Sequence[Row]) -> Circumstances:
    """What the rows say of the run's circumstances."""
    answers: dict[tuple[str, str], tuple[str, dict[int, str]]] = {}
    for row in rows:
        if isinstance(row, Answer):
            answers.setdefault((row.domain, row.prompt), (row.expected, {}))[1][row.round] = row.text
    return Circumstances(
        sessions=tuple(row for row in rows if isinstance(row, Session)),
        end=next((row for row in reversed(rows) if isinstance(row, End)), None),
        examples={row.client: row.examples for row in rows if isinstance(row, Training)},
        answers=answers,
    )


def describe_circumstances(facts: Circumstances) -> list[tuple[str, str]]:
    """(what, in words): how the run ended, when it began, how long it took, on which machine, with which versions."""
    found: list[tuple[str, str]] = []
    if facts.end is not None:
        found.append(("ended", ": ".join(filter(None, (facts.end.status, facts.end.reason)))))
    if facts.sessions:
        first, last = facts.sessions[0], facts.sessions[-1]
        resumed = len(facts.sessions) - 1
        times = "once" if resumed == 1 else f"{resumed} times"
        again = f", resumed {times}" if resumed else ""
        found.append(("began", first.time.replace("T", " ").replace("+00:00", " UTC") + again))
        if facts.end is not None:
            found.append(("took", human_seconds(facts.end.seconds)))
        found.append(("machine", ", ".join(last.machine.values())))
        found.append(("versions", ", ".join(f"{name} {version}" for name, version in last.versions.items())))
    return found


def human_seconds(seconds: float) -> str:
    """A length of time in its two largest units; "–" where it is not known."""
    if not 0 <= seconds < float("inf"):
        return "–"
    if seconds < 60:
        if 0 < seconds < 0.05:
            return "< 0.1 s"
        return f"{seconds:.1f} s"
    whole = round(seconds)
    hours, minutes = whole // 3600, whole % 3600 // 60
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"
