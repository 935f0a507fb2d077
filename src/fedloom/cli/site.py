"""`fedloom site`: what the people at a site see and decide: jobs that ask, what they would send, what the worker does.

Only `show` and `preview` load torch: they look at the base model's shapes.
"""

from __future__ import annotations

import getpass
import json
import math
import os
import shlex
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from fedloom.cli.dossier import dossier_rows, local_time, overview_rows, rehearsal_rows
from fedloom.cli.options import AsJson, Set
from fedloom.records.text import cell, escape_json
from fedloom.report.numbers import human_bytes

if TYPE_CHECKING:
    from fedloom.site.approval import Job, JobBook
    from fedloom.site.config import SiteConfig

app = typer.Typer(no_args_is_help=True, help="At a site: see what jobs ask for, allow or refuse them, keep order.")
screen = Console()
LONGEST = 4000
"""Characters of one answer."""

File = Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's file.", envvar="FEDLOOM_SITE")]
Site = Annotated[Path, typer.Option("--site", metavar="SITE.toml", help="The site's file.", envvar="FEDLOOM_SITE")]
Name = Annotated[str, typer.Argument(metavar="JOB", help="The job's name, or its beginning; `fedloom site jobs`.")]
HERE = Path("SITE.toml")


@dataclass(frozen=True, slots=True)
class JobRow:
    """A line of `fedloom site jobs`. Times are UTC; rounds: None where the settings are not at hand."""

    job: str
    standing: str
    asked: str
    decided: str
    who: str
    method: str
    rounds: int | None
    bytes: int


@app.command()
def jobs(site: File = HERE, as_json: AsJson = False) -> None:
    """List the jobs that this site was asked for: waiting, approved, refused, begun, done, over."""
    here, book = _open(site)
    rows = job_rows(here, book, datetime.now(UTC))
    if as_json:
        print(escape_json(json.dumps([asdict(row) for row in rows], indent=2, ensure_ascii=False)))
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("job", "state", "since", "by", "method", "rounds"):
        table.add_column(name, overflow="fold", no_wrap=name == "job", justify="right" if name == "rounds" else "left")
    for row in rows:
        since = local_time(row.decided or row.asked)
        table.add_row(*map(cell, (row.job, row.standing, since, row.who, row.method, str(row.rounds or ""))))
    if rows:
        screen.print(table)
    waiting = [row for row in rows if row.standing == "waiting"]
    if waiting:
        _say(f"{len(waiting)} waiting: `fedloom site show {waiting[0].job}{_option(site)}` says what it is")
    elif not rows:
        _say(f"{here.name} has been asked for no job yet")


@app.command()
def show(job: Name, site: Site = HERE, as_json: AsJson = False) -> None:
    """Say what a job is: what it trains, with how much of the data, what leaves, and what that costs."""
    from fedloom.site.audit import AuditTrail
    from fedloom.site.dossier import describe_job
    from fedloom.site.told import read_told

    here, book = _open(site)
    found = book.named(job)
    seen = describe_job(here, read_told(book.settings_of(found), here), site, found.job)
    if as_json:
        print(escape_json(json.dumps({"job": asdict(found), **asdict(seen)}, indent=2, ensure_ascii=False)))
        return
    base = f"{here.model}, the very files that the server has (digest {found.base})"
    so_far = AuditTrail(Path(here.state) / "audit").payloads_of(found.job)
    head = [("job", found.name), ("state", standing_text(here, found)), ("so far", so_far_text(so_far))]
    print_rows([*head, *dossier_rows(here, seen, base)])
    if found.standing(here.policy.approve == "ask", datetime.now(UTC)) == "waiting":
        _say(f"allow it: fedloom site approve {found.name}{_option(site)} [--rounds N] [--until DATE]")
        _say(f"or not:   fedloom site refuse {found.name}{_option(site)} [--reason TEXT]")


@app.command()
def approve(
    job: Name,
    site: Site = HERE,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Updates that may leave in all; otherwise the job's own rounds.")
    ] = None,
    until: Annotated[
        str | None, typer.Option(metavar="DATE", help="Last day on which it may train, such as 2027-01-31.")
    ] = None,
) -> None:
    """Allow a job: this one, with these very settings. A worker that runs takes part the next time it is asked."""
    from fedloom.site.approval import Line, parse_until, time_text

    now = datetime.now(UTC)
    here, book = _open(site)
    end = time_text(parse_until(until, now)) if until else None
    found = book.named(job)
    book.settings_of(found)  # raises where they are not those that were asked for
    said = Line(time_text(now), "approved", found.job, found.settings, who=_user(), rounds=rounds, until=end)
    _say(f"job {found.name}: {standing_text(here, book.decide(found, said))}")
    if here.policy.approve != "ask":
        _say(f'nobody is asked here: {site} has no approve = "ask" in [policy], so every job that it allows takes part')


@app.command()
def refuse(
    job: Name,
    site: Site = HERE,
    reason: Annotated[str, typer.Option(help="Why; the server is told.")] = "",
) -> None:
    """Refuse a job, also one that was allowed: it stops before its next round."""
    from fedloom.site.approval import Line, time_text

    here, book = _open(site)
    found = book.named(job)
    said = Line(time_text(datetime.now(UTC)), "refused", found.job, found.settings, who=_user(), reason=reason[:200])
    _say(f"job {found.name}: {standing_text(here, book.decide(found, said))}")
    if here.policy.approve != "ask":
        _say(f'{site} has no approve = "ask" in [policy]: set it, and restart the worker, or the job goes on')


@app.command()
def preview(
    site: Annotated[Path, typer.Argument(metavar="SITE.toml", help="The site's file.")],
    run: Annotated[Path, typer.Argument(metavar="RUN.toml", help="Settings of a run, as its server has them.")],
    sets: Set = None,
    train: Annotated[
        bool, typer.Option("--train", help="Play one round here, measure what would leave, and throw it away.")
    ] = False,
) -> None:
    """Say before joining what a run would be for this site, and what its policy has against it. Connects to nothing."""
    from fedloom.flower.settings import shared_settings
    from fedloom.model.identity import base_digest
    from fedloom.records.configfile import load_config
    from fedloom.site.config import load_site_config
    from fedloom.site.dossier import describe_job
    from fedloom.site.told import read_told

    here = load_site_config(site)
    settings, base = shared_settings(load_config(run, sets or [])), base_digest(here.model)
    seen = describe_job(here, read_told(settings, here), site)
    print_rows(dossier_rows(here, seen, f"{here.model} (digest {base}; the server must have the same)"))
    if train:
        from fedloom.site.rehearsal import rehearse_turn

        with screen.status("training one round"):
            played = rehearse_turn(here, settings, base)
        print_rows(rehearsal_rows(played, seen))


@app.command()
def prune(
    site: File = HERE,
    older: Annotated[str, typer.Option(metavar="AGE", help="Not used for so long: 30d, 12h, 2w.")] = "30d",
    force: Annotated[bool, typer.Option("--force", help="Also jobs whose result was never delivered.")] = False,
) -> None:
    """Remove the folders of jobs that are over. The record of what left is never touched."""
    from fedloom.site.config import load_site_config
    from fedloom.site.prune import parse_age, prune_jobs

    removed, kept = prune_jobs(load_site_config(site), parse_age(older), datetime.now(UTC), force=force)
    for folder in removed:
        _say(
            f"removed {folder.path.name}: {human_bytes(folder.bytes)}, last used {local_time(folder.used.isoformat())}"
        )
    for job, why in kept.items():
        _say(f"kept {job}: {why}")
    freed = sum(folder.bytes for folder in removed)
    _say(f"{len(removed)} jobs removed, {human_bytes(freed)} ({freed:,} bytes) freed")


@app.command()
def status(site: File = HERE, as_json: AsJson = False) -> None:
    """Say what the worker does, what the site has sent and spent, and who waits."""
    from fedloom.site.overview import look_at_site

    here, book = _open(site)
    seen = look_at_site(here, book, datetime.now(UTC))
    if as_json:
        print(json.dumps(asdict(seen), indent=2, ensure_ascii=False))
        return
    print_rows(overview_rows(here, seen))


def so_far_text(left: Mapping[str, int]) -> str:
    """What has left of a job."""
    return f"{len(left):,} updates have left, {sum(left.values()):,} bytes" if left else "nothing has left"


@app.command()
def key(site: File = HERE) -> None:
    """Print the line by which other sites know this one in secure sums, for [peers] of their SITE.toml."""
    from fedloom.site.config import load_site_config
    from fedloom.site.sums import load_identity

    here = load_site_config(site)
    public = load_identity(Path(here.state)).public_key().public_bytes_raw()
    print(f'{json.dumps(here.name)} = "{public.hex()}"')


def job_rows(here: SiteConfig, book: JobBook, now: datetime) -> list[JobRow]:
    """All jobs of the book, and the folders of those from before there was one."""
    from fedloom.site.audit import AuditTrail
    from fedloom.site.prune import list_folders

    folders = {folder.path.name: folder for folder in list_folders(Path(here.state))}
    trail = AuditTrail(Path(here.state) / "audit")
    rows = []
    for job in book.jobs():
        method, rounds = _told(book, job)
        folder, said = folders.get(job.job), job.decision
        standing = job.standing(here.policy.approve == "ask", now)
        when, who = (said.time, said.who) if said else ("", "")
        if standing == "approved" and said and said.rounds is not None and said.rounds < (rounds or math.inf):
            standing = "over" if len(trail.payloads_of(job.job)) >= said.rounds else standing
        rows.append(JobRow(job.name, standing, job.asked, when, who, method, rounds, folder.bytes if folder else 0))
    known = {job.job for job in book.jobs()}
    for name, folder in folders.items():
        if name not in known:
            standing = "done" if folder.delivered else "begun"
            rows.append(JobRow(name, standing, folder.used.isoformat(), "", "", "", None, folder.bytes))
    return rows


def _told(book: JobBook, job: Job) -> tuple[str, int | None]:
    """Method and rounds, as the job's settings have them; ("", None) where they cannot be read."""
    from fedloom.errors import SiteError

    try:
        tree = tomllib.loads(book.settings_of(job))
        return str(tree["method"]["name"]), int(tree["federation"]["num_rounds"])
    except (SiteError, ValueError, KeyError, TypeError):
        return "", None


def standing_text(here: SiteConfig, job: Job) -> str:
    """How a job stands, in a sentence."""
    from fedloom.site.approval import count_rounds

    said = job.decision
    if said is None:
        ask = here.policy.approve == "ask"
        word = job.standing(ask, datetime.now(UTC))
        return f"{word}, first asked for {local_time(job.asked)}"
    parts = [f"{said.event} by {said.who}, {local_time(said.time)}"]
    if said.event == "approved":
        parts.append(f"for {count_rounds(said.rounds)} in all" if said.rounds else "for all of its rounds")
        parts.append(f"until {local_time(said.until)}" if said.until else "")
    parts.append(f"because: {said.reason}" if said.reason else "")
    parts.append(f"done {local_time(job.done)}" if job.done else "")
    return "; ".join(filter(None, parts))


def print_rows(rows: Iterable[tuple[str, str]]) -> None:
    """Names with their answers beside them, in two columns. Texts may be a server's."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in rows:
        table.add_row(cell(name), cell(text, "", LONGEST))
    screen.print(table)
    screen.print()


def _open(path: Path) -> tuple[SiteConfig, JobBook]:
    from fedloom.site.approval import JobBook
    from fedloom.site.config import load_site_config

    here = load_site_config(path)
    return here, JobBook(Path(here.state), ask=here.policy.approve == "ask")


def _option(site: Path) -> str:
    """What a command that is printed has to say of the site's file."""
    return "" if site == HERE else f" --site {shlex.quote(str(site))}"


def _user() -> str:
    """Who decides: the person behind sudo, where there is one."""
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # a container may have no name for its user
        return f"user {os.getuid()}"


def _say(text: str) -> None:
    screen.print(cell(text, "", LONGEST), soft_wrap=True)
