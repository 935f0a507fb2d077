"""Where a run comes from: how it ended, when, on what and with which settings, and the commands that make it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from fedloom.records.text import LONG, to_printable
from fedloom.report.facts import describe_circumstances
from fedloom.report.numbers import Report, human_bytes
from fedloom.report.page.model import Block, Section, Table, Words
from fedloom.report.page.run import PageRun, Variant
from fedloom.report.sampling import MOST, say_sampled

MOST_LINES = 2000
"""Lines of settings that a page shows: a run with a table for each of many clients has no end of them."""


def describe_origin(run: PageRun) -> Section:
    """Circumstances, the commands, the settings."""
    report = run.report
    blocks: list[Block] = []
    known = [("run", _facts(report)), ("base model", report.run.model), *describe_circumstances(report.facts)]
    blocks.append(Table("circumstances", "Circumstances", ("", ""), known, words=True))
    blocks.append(Words("commands", "\n".join(reproduce(run)), "How to make it again", code=True))
    if run.settings:
        lines = run.settings.splitlines()
        more = [f"# … and {len(lines) - MOST_LINES:,} more lines in config.toml"] if len(lines) > MOST_LINES else []
        blocks.append(Words("settings", "\n".join([*lines[:MOST_LINES], *more]), "Settings", code=True, folded=True))
    return Section("origin", "Where it comes from", blocks)


def _facts(report: Report) -> str:
    run = report.run
    facts = (
        f"{run.num_rounds} rounds, {len(run.clients)} clients, seed {run.seed}, {run.adapter_values:,} adapter values"
    )
    if run.data_bytes:
        facts += f", the clients' own data {human_bytes(sum(run.data_bytes.values()))} by {run.data_coding}"
    return facts


def reproduce(run: PageRun) -> list[str]:
    """The commands: the same versions, the settings as the run keeps them, a folder of its own."""
    sessions = run.report.facts.sessions
    versions = sessions[-1].versions if sessions else {}
    packages = [f"{name}=={version}" for name, version in versions.items() if _is_package(name, version)]
    install = ["pip", "install", *packages] if packages else []
    name = run.folder.name or "run"
    config = shlex.quote(str(run.folder / "config.toml"))
    commands = [shlex.join(install)] if install else []
    engine = _engine(run.folder)
    commands.append(f"fedloom run {config} --out {shlex.quote(f'runs/{name}-again')}{engine}")
    return (
        [
            "# the versions that it was made with",
            *commands[:-1],
            "# the settings that it keeps; the same seed on the same machine makes the same bytes",
            commands[-1],
        ]
        if install
        else commands
    )


def _is_package(name: str, version: str) -> bool:
    """Whether pip would know it: python itself and a build of a version are no packages."""
    return name != "python" and re.fullmatch(r"[A-Za-z0-9._-]+", name) is not None and "+" not in version


def _engine(folder: Path) -> str:
    if (folder / "sites").is_dir():
        return " --engine flower-sim"
    return " --engine flower" if (folder / "job").exists() else ""


def describe_notes(report: Report) -> Section | None:
    """What happened besides, in words."""
    if not report.notes:
        return None
    rows = [(str(note.round), note.text) for note in report.notes[-MOST:]]
    note = say_sampled("notes", len(report.notes), "the newest")
    return Section("notes", "Notes", [Table("happened", "What happened", ("round", "what"), rows, note, words=True)])


def describe_answers(report: Report) -> Section | None:
    """Held-out examples that the model was asked before the first and after the last round."""
    rows = [
        (domain, prompt, expected, by_round[min(by_round)], by_round[max(by_round)])
        for (domain, prompt), (expected, by_round) in report.facts.answers.items()
    ][:MOST]
    if not rows:
        return None
    head = ("domain", "prompt", "expected", "before", "after")
    table = Table("answers-table", "Answers to held-out examples", head, rows, words=True)
    return Section("answers", "Answers", [table])


def compare_origins(variants: Sequence[Variant]) -> Section:
    """Every run that the page is of: its folder, how it stands, what it was made with."""
    rows = [
        (
            variant.name,
            str(run.report.run.seed),
            str(run.folder),
            _state(run),
            ", ".join(run.report.facts.sessions[-1].machine.values()) if run.report.facts.sessions else "–",
        )
        for variant in variants
        for run in variant.runs
    ]
    head = ("run", "seed", "folder", "state", "machine")
    note = say_sampled("runs", len(rows), "the first")
    commands = "\n".join(reproduce(run)[-1] for variant in variants for run in list(variant.runs)[:1])
    return Section(
        "origin",
        "Where they come from",
        [
            Table("runs", "The runs", head, rows[:MOST], note, words=True),
            Words("commands", commands, "How to make them again, the first seed of each", code=True),
        ],
    )


def _state(run: PageRun) -> str:
    end = run.report.facts.end
    if run.standing is not None:
        return to_printable(run.standing.describe() if run.standing.is_over else "running", LONG)
    return to_printable(": ".join(filter(None, (end.status, end.reason))), LONG) if end else "–"
