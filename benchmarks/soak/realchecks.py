"""What must hold at the end of a soak with real processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from benchmarks.soak.play import Size, attendance
from benchmarks.soak.realfaults import SERVERS
from fedloom.errors import FedloomError
from fedloom.records.ledger import Training, Transfer, read_rows
from fedloom.site.audit import AuditTrail

if TYPE_CHECKING:
    from benchmarks.soak.processes import Federation

ADAPTER = "adapter/adapter_model.safetensors"
RECOVERY = 2
"""Rounds after a fault's own in which its site may still be away: Flower takes up to a minute to let a node back in."""
Told = Sequence[Mapping[str, Any]]


def check_all(
    federation: Federation, size: Size, out: Path, undisturbed: Path, told: Told, ends: Sequence[str], finished: bool
) -> dict[str, list[str]]:
    """Check → what it found wrong. The federation's processes have been ended by now."""
    job = (out / "job").read_text(encoding="utf-8")
    states = {site: federation.folder / "fed/sites" / site / "state" for site in size.names}
    return {
        "ends by itself": list(check_end(told, ends, finished)),
        "the adapter of the same attendance undisturbed": list(check_adapter(out, undisturbed)) if finished else [],
        "who was undisturbed was counted": list(check_attendance(out, size, told)),
        "every turn counted once": list(check_turns(out, states, job)),
        "every byte counted once": list(check_bytes(out, states)),
        "nothing left behind": list(check_remains(federation, out, states)),
    }


def check_end(told: Told, ends: Sequence[str], finished: bool) -> Iterator[str]:
    """The run ends by itself; only what befell the server made somebody start it again."""
    if not finished:
        yield "it did not end"
    # A SuperLink that comes back with a good certificate was ended twice.
    allowed = sum((one["fault"] in SERVERS) + (one["fault"] == "certificate expired") for one in told)
    if len(ends) > allowed:
        yield f"{len(ends)} sessions ended early, {allowed} faults could end one: {'; '.join(ends)}"


def check_adapter(out: Path, undisturbed: Path) -> Iterator[str]:
    """The same bytes."""
    if (out / ADAPTER).read_bytes() != (undisturbed / ADAPTER).read_bytes():
        yield "the server's adapter is another"


def check_attendance(out: Path, size: Size, told: Told) -> Iterator[str]:
    """A site that nothing befell lately is counted."""
    for round, sites in attendance(read_rows(out / "ledger.jsonl")).items():
        lately = [one for one in told if round - RECOVERY <= one["round"] <= round]
        away = {one["site"] for one in lately} | (
            set(size.names) if any(o["fault"] in SERVERS for o in lately) else set()
        )
        yield from (f"round {round}: {site} was not counted, and nothing had befallen it"
                    for site in size.names if site not in sites and site not in away)  # fmt: skip


def check_turns(out: Path, states: Mapping[str, Path], job: str) -> Iterator[str]:
    """One training a site and round in the server's ledger, at most one in the site's own."""
    rows = read_rows(out / "ledger.jsonl")
    counted = Counter((row.client, row.round) for row in rows if isinstance(row, Training))
    for round, sites in attendance(rows).items():
        yield from (
            f"round {round}: {counted[site, round]} trainings of {site}" for site in sites if counted[site, round] != 1
        )
    for site, state in states.items():
        own = Counter(
            row.round for row in read_rows(state / "jobs" / job / "ledger.jsonl") if isinstance(row, Training)
        )
        yield from (
            f"round {round}: {times} rows of training in {site}'s own ledger"
            for round, times in own.items()
            if times > 1
        )


def check_bytes(out: Path, states: Mapping[str, Path]) -> Iterator[str]:
    """Every update that the server counted is in its site's record, and so is every payload that it kept."""
    rows = [row for row in read_rows(out / "ledger.jsonl") if isinstance(row, Transfer) and row.direction == "up"]
    kept = {sha256(path.read_bytes()).hexdigest() for path in (out / "payloads").glob("*-up-*")}
    left: set[str] = set()
    for site, state in states.items():
        try:
            lines, moved, _ = AuditTrail(state / "audit").verify()
        except FedloomError as error:
            yield f"{site}: {error}"
            continue
        left |= {line.payload for line in lines}
        sizes = Counter(line.bytes for line in lines)
        counted = Counter(row.bytes for row in rows if row.client == site)
        if counted - sizes:
            yield f"{site}: the server counted more updates than left"
        if moved:
            yield f"{site}: {len(moved)} payloads of its record are gone"
    if kept - left:
        yield f"{len(kept - left)} payloads at the server left no site"


def check_remains(federation: Federation, out: Path, states: Mapping[str, Path]) -> Iterator[str]:
    """No process, no socket, no partial file."""
    mark = str(federation.folder)
    for process in psutil.process_iter(["cmdline"]):
        if any(mark in part for part in process.info["cmdline"] or ()) and process.pid != psutil.Process().pid:
            yield f"a process: {' '.join(process.info['cmdline'])[:200]}"
    for folder in (out, *states.values()):
        yield from (f"a file: {path}" for path in folder.rglob("*") if path.suffix in (".partial", ".tmp"))
    yield from (f"a socket: {path}" for path in (federation.folder / "fed").rglob("*.sock"))
