"""The page about a soak, made from its JSON: what was checked, what each fault did, round by round."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.soak.checks import ADAPTER, CHECKS, check_adapter, digest_file
from benchmarks.soak.faults import FAULTS
from benchmarks.soak.play import Size, Soak, play, undisturbed
from fedloom.records.ledger import Roll, read_rows

FIRST = "the adapter of the same attendance undisturbed"
HEAD = """# The soak

A federation in which something breaks in every round: {sites} sites, {rounds} rounds, {kinds} kinds of fault,
drawn with seed {seed}.

```sh
make soak
```

Rounds, sites, policy, records and everything on disk are the real code. Flower's transport and the training step are
made up, and time is simulated: {simulated} minutes of it passed. kill -9 comes at any step on disk or on the line, and
takes back what the process had not handed to the system. A full disk is the system's own limit on the size of files.
Whenever a session of the server ends early, the run is resumed, as its operator would. A request that was about to
leave at that moment counts as sent; answers that were fetched and not yet written down come again, and count once.

`make soak-processes`, and ten minutes of it in `make check-slow`, play a smaller one in real time: SuperLink, server
app, `fedloom node` and workers over TLS, each site behind a line of its own. Its faults are these, but for messages
that are doubled or changed, which TLS rules out, and with a slow line and a bit that changes on the line beside them.

## What holds at the end

| check | found wrong |
|---|---|
{checks}

Sessions of the server that ended early, and were resumed: {sessions}. Trainings: {trainings}, in vain: {wasted}.
Adapter: SHA-256 {adapter}….

## What each fault did

| fault | how often | sites counted in its round, on average | rounds that the site missed |
|---|---:|---:|---:|
{kinds_table}

## Round by round

| round | fault | whom | | counted | not counted |
|---:|---|---|---|---:|---|
{rounds_table}
"""


def run(size: Size, folder: Path | None = None) -> dict[str, Any]:
    """Play a soak and check it. folder: where it is left; otherwise nothing is."""
    if folder is None:
        with tempfile.TemporaryDirectory() as place:
            return run(size, Path(place))
    soak = play(size, folder)
    found = {name: list(check(soak)) for name, check in CHECKS.items()}
    if soak.finished:
        found = {FIRST: list(check_adapter(soak, undisturbed(soak))), **found}
    return describe(soak, found)


def describe(soak: Soak, found: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """All that the page says."""
    rolls = {row.round: row for row in read_rows(soak.run / "ledger.jsonl") if isinstance(row, Roll)}
    strikes = {strike.round: strike for strike in soak.strikes}
    attended = {round: roll.answered for round, roll in rolls.items()}
    return {
        "size": asdict(soak.size),
        "simulated_s": round(soak.seconds),
        "ends": soak.ends,
        "checks": {name: list(wrong) for name, wrong in found.items()},
        "trainings": sum(soak.trainings.values()),
        "wasted": sum(times - (site in attended.get(round, ())) for (site, round), times in soak.trainings.items()),
        "adapter": digest_file(soak.run / ADAPTER) if soak.finished else "",
        "rounds": [
            {
                "round": number,
                "fault": strikes[number].fault if number in strikes else "",
                "site": strikes[number].site if number in strikes else "",
                "told": strikes[number].told if number in strikes else "",
                "answered": len(roll.answered),
                "failed": dict(roll.failed),
                "missed": sum(
                    number in strikes
                    and strikes[number].site not in ("", *attended.get(later, (strikes[number].site,)))
                    for later in range(number, number + 4)
                ),
            }
            for number, roll in sorted(rolls.items())
        ],
    }


def page(result: Mapping[str, Any]) -> str:
    """The page, as Markdown."""
    size, rounds = result["size"], result["rounds"]
    return HEAD.format(
        sites=size["sites"],
        rounds=size["rounds"],
        seed=size["seed"],
        kinds=len(FAULTS),
        simulated=f"{result['simulated_s'] / 60:.0f}",
        checks="\n".join(f"| {name} | {len(wrong) or 'nothing'} |" for name, wrong in result["checks"].items()),
        sessions=len(result["ends"]),
        trainings=result["trainings"],
        wasted=result["wasted"],
        adapter=result["adapter"],
        kinds_table="\n".join(_kind(name, [row for row in rounds if row["fault"] == name]) for name in FAULTS),
        rounds_table="\n".join(map(_round, rounds)),
    )


def _round(row: Mapping[str, Any]) -> str:
    whom = row["site"] or ("the server" if row["fault"] else "")
    cells = (row["round"], row["fault"] or "—", whom, row["told"], row["answered"], ", ".join(sorted(row["failed"])))
    return f"| {' | '.join(map(str, cells))} |"


def _kind(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return f"| {name} | 0 | | |"
    counted = sum(row["answered"] for row in rows) / len(rows)
    missed = ", ".join(str(row["missed"]) for row in rows) if any(row["site"] for row in rows) else ""
    return f"| {name} | {len(rows)} | {counted:.1f} | {missed} |"


def tables(result: Mapping[str, Any]) -> list[Table]:
    """What a terminal shows: the checks, and the first things that were found wrong."""
    table = Table("check", "found wrong", title="soak")
    for name, wrong in result["checks"].items():
        table.add_row(name, "nothing" if not wrong else f"{len(wrong)}: {'; '.join(wrong[:3])}")
    return [table]
