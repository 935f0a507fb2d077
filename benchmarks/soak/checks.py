"""What must hold at the end of a soak. Each check gives what it found wrong, nothing where all is well."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from benchmarks.soak.faults import SERVERS, Strike
from benchmarks.soak.play import Soak, attendance
from benchmarks.soak.superlink import SimNode
from fedloom.errors import FedloomError
from fedloom.records.ledger import Row, Training, Transfer, payload_name, read_rows
from fedloom.site.audit import AuditTrail

ADAPTER = "adapter/adapter_model.safetensors"


def check_end(soak: Soak) -> Iterator[str]:
    """The run ends by itself; only what befell the server made somebody start it again."""
    if not soak.finished:
        yield f"it did not end: {soak.ends[-1] if soak.ends else 'no session'}"
    struck = sum(strike.fault in SERVERS for strike in soak.strikes)
    if len(soak.ends) > struck:
        yield f"{len(soak.ends)} sessions ended early, {struck} faults befell the server: {'; '.join(soak.ends)}"


def check_adapter(soak: Soak, undisturbed: Path) -> Iterator[str]:
    """The adapter is bit for bit that of the same attendance undisturbed, at the server and wherever it arrived."""
    expected = (undisturbed / ADAPTER).read_bytes()
    if (soak.run / ADAPTER).read_bytes() != expected:
        yield "the server's adapter is another"
    notes = (soak.run / "ledger.jsonl").read_text(encoding="utf-8")
    for node in soak.nodes:
        held = job_folder(soak, node) / ADAPTER
        missing = f"client {node.site.name} has not confirmed that it received the result"
        if held.exists() and held.read_bytes() != expected:
            yield f"{node.site.name} has another adapter"
        elif not held.exists() and missing not in notes:
            yield f"{node.site.name} has no adapter, and no note says so"


def check_attendance(soak: Soak) -> Iterator[str]:
    """A site that nothing befell in a round is counted in it, whatever befell it before."""
    attended = attendance(rows_of(soak))
    for round, sites in attended.items():
        begins = soak.link.began[round]
        ends = soak.link.began.get(round + 1, begins + soak.seconds)
        for site in soak.size.names:
            if site not in sites and not any(overlaps(strike, site, begins, ends) for strike in soak.strikes):
                yield f"round {round}: {site} was not counted, and nothing had befallen it"


def overlaps(strike: Strike, site: str, begins: float, ends: float) -> bool:
    """Whether a fault befell this site between these times. What befalls the server befalls nobody's answer."""
    return strike.site == site and strike.begins <= ends and strike.ends >= begins


def check_turns(soak: Soak) -> Iterator[str]:
    """One training and one counted update a site and round; nothing is trained twice but what a crash took."""
    rows = rows_of(soak)
    counted = Counter((row.client, row.round) for row in rows if isinstance(row, Training))
    for round, sites in attendance(rows).items():
        for site in sites:
            if counted[site, round] != 1:
                yield f"round {round}: the server's ledger has {counted[site, round]} trainings of {site}"
    excused = Counter(strike.site for strike in soak.strikes if strike.fault in TAKES_TRAINING)
    for (site, round), times in soak.trainings.items():
        if times > 1 + excused[site]:
            yield f"round {round}: {site} trained {times} times"
    for node in soak.nodes:
        own = Counter(row.round for row in site_rows(soak, node) if isinstance(row, Training))
        yield from (f"round {round}: {times} rows of training in {node.site.name}'s own ledger"
                    for round, times in own.items() if times > 1)  # fmt: skip


TAKES_TRAINING = {"kill -9 of a worker", "kill -9 of node and worker", "full disk at a site"}
"""Faults after which a site may have to train a round again."""


def check_wasted(soak: Soak) -> Iterator[str]:
    """A site trains for nothing only in a round in which a fault befell it, or the server."""
    attended = attendance(rows_of(soak))
    for site, round in soak.trainings:
        begins = soak.link.began[round]
        ends = soak.link.began.get(round + 1, begins + soak.seconds)
        excused = any(overlaps(strike, site, begins, ends) for strike in soak.strikes)
        if site not in attended.get(round, ()) and not excused:
            yield f"round {round}: {site} trained and was not counted, and nothing had befallen it"


def check_bytes(soak: Soak) -> Iterator[str]:
    """The server's ledger has every byte that the link carried, once; kept payloads are those that it names."""
    rows = [row for row in rows_of(soak) if isinstance(row, Transfer)]
    said = {way: Counter[str]() for way in ("up", "down")}
    for row in rows:
        said[row.direction][row.client] += row.bytes
    carried: dict[str, Counter[str]] = {"up": Counter(), "down": Counter()}
    for one in soak.link.sent:
        carried["down"][one.site] += one.bytes
    last = {one.fetched[0]: one.fetched for one in soak.link.taken}
    unsure: Counter[str] = Counter()
    for one in soak.link.taken:
        # What was bent on the way is no payload, so the ledger has no row for it.
        size = 0 if one.spoilt or one.ask != "turn" else one.bytes
        carried["up"][one.site] += size
        if one.fetched[0] <= len(soak.ends) and one.fetched == last[one.fetched[0]]:
            # The session ended with these at hand: killed, or its disk took no row any more.
            unsure[one.site] += size
    ahead: list[str] = []
    for way, found in said.items():
        for site in soak.size.names:
            lacks = carried[way][site] - found[site]
            text = f"{site}: {found[site]:,} B {way} by the ledger, {carried[way][site]:,} B by the link"
            if way == "down" and lacks < 0:
                ahead.append(text)
            elif not 0 <= lacks <= (unsure[site] if way == "up" else 0):
                yield text
    # A request counts before it is posted: one a session may have been about to leave when the server was killed.
    if len(ahead) > len(soak.ends):
        yield from ahead
    kept = {path.name: path.stat().st_size for path in (soak.run / "payloads").glob("*")}
    for row in rows:
        start = payload_name(row.round, row.client, row.direction)
        if not any(name.startswith(start) and size == row.bytes for name, size in kept.items()):
            yield f"round {row.round}: no kept payload of {row.bytes:,} B {row.direction} for {row.client}"


def check_records(soak: Soak) -> Iterator[str]:
    """Sites' records are unbroken, and hold every payload that reached the server."""
    taken = defaultdict(set)
    for one in soak.link.taken:
        if one.ask == "turn" and one.what:
            taken[one.site].add((one.round, one.what))
    for node in soak.nodes:
        try:
            lines, moved, _ = AuditTrail(Path(node.site.state) / "audit").verify()
        except FedloomError as error:
            yield f"{node.site.name}: {error}"
            continue
        held = {(line.round, line.payload) for line in lines}
        yield from (f"{node.site.name}: a payload of round {round} left without a line"
                    for round, what in taken[node.site.name] - held)  # fmt: skip
        if moved:
            yield f"{node.site.name}: {len(moved)} payloads of its record are gone"
        rounds = Counter(round for round, _ in held)
        yield from (f"{node.site.name}: {times} different payloads of round {round} left"
                    for round, times in rounds.items() if times > 1)  # fmt: skip
        own = {
            (row.round, row.bytes)
            for row in site_rows(soak, node)
            if isinstance(row, Transfer) and row.direction == "up"
        }
        yield from (f"{node.site.name}: round {line.round} left and is not in its ledger"
                    for line in lines if line.payload and (line.round, line.bytes) not in own)  # fmt: skip


def check_remains(soak: Soak) -> Iterator[str]:
    """Nothing is left behind: no partial file, no open file, no second job, no message that is worked on."""
    for path in sorted(soak.folder.rglob("*")):
        if path.suffix in (".partial", ".frozen", ".tmp"):
            yield f"left behind: {path.relative_to(soak.folder)}"
    for node in soak.nodes:
        jobs = [path.name for path in (Path(node.site.state) / "jobs").glob("*")]
        if len(jobs) > 1:
            yield f"{node.site.name} has {len(jobs)} jobs"
        if node.busy is not None or node.inbox:
            yield f"{node.site.name} still has a message"
    if soak.open_files:
        yield f"{soak.open_files} more files are open than before"


CHECKS: Mapping[str, Callable[[Soak], Iterator[str]]] = {
    "ends by itself": check_end,
    "who was undisturbed was counted": check_attendance,
    "every turn counted once": check_turns,
    "nothing trained in vain without a fault": check_wasted,
    "every byte counted once": check_bytes,
    "sites' records unbroken and complete": check_records,
    "nothing left behind": check_remains,
}


def rows_of(soak: Soak) -> list[Row]:
    """The rows of the server's ledger."""
    return read_rows(soak.run / "ledger.jsonl")


def job_folder(soak: Soak, node: SimNode) -> Path:
    """Where a site keeps the run's state."""
    return Path(node.site.state) / "jobs" / (soak.run / "job").read_text(encoding="utf-8")


def site_rows(soak: Soak, node: SimNode) -> list[Row]:
    """The rows of a site's own ledger."""
    path = job_folder(soak, node) / "ledger.jsonl"
    return read_rows(path) if path.exists() else []


def digest_file(path: Path) -> str:
    """SHA-256 of a file, in short."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
