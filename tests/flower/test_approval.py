"""`approve = "ask"`: a job waits for a person at the site, who allows this very job, for so long, and nothing else."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

import desks
import pytest

from fedloom.errors import ConfigError, PolicyRefusal, SiteError
from fedloom.flower.settings import shared_settings
from fedloom.model.identity import base_digest
from fedloom.records.ledger import Presence, Roll, read_rows
from fedloom.site.approval import MOST_WAITING, WAITS, JobBook, Line, parse_until, time_text
from fedloom.site.desk import Desk
from fedloom.site.presence import read_presence
from fedloom.site.protocol import Parcel, Request
from fedloom.site.rules import Policy

pytestmark = pytest.mark.flower
JOB, OTHER = "0123456789abcdef", "f" * 16
ASK = Policy(order="run", approve="ask")
NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)


@pytest.fixture
def desk(tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.site.setups.build_setup", lambda *arguments, **named: desks.assemble(*arguments))
    made = Desk(desks.site("lab", tmp_path, ASK))
    yield made
    made.close()


def ask(desk: Desk, what: str, *overrides: str, job: str = JOB, round: int = 1, **facts) -> Parcel:
    asked = {"ask": what, "job": job, "settings": shared_settings(desks.settings(*overrides)), "round": round}
    return desk.answer(Parcel({**asked, "base": base_digest(desk.site.model), **facts}))


def book(desk: Desk) -> JobBook:
    """As a command sees it: a book of its own, of the same file."""
    return JobBook(Path(desk.site.state), ask=True)


def decide(desk: Desk, name: str, event: str = "approved", **terms) -> None:
    job = book(desk).named(name)
    book(desk).decide(job, Line(time_text(NOW), event, job.job, job.settings, who="ada", **terms))


def error(reply: Parcel) -> str:
    return str(reply.facts.get("error", "")).partition(" (reference")[0]


def standings(desk: Desk) -> list[str]:
    return [job.standing(True, datetime.now(UTC)) for job in book(desk).jobs()]


def test_a_new_job_waits_and_loads_nothing_until_a_person_allows_it(desk):
    for what in ("hello", "turn", "deliver", "hello"):
        assert error(ask(desk, what)) == WAITS and desk.place is None
    assert standings(desk) == ["waiting"] and not list(Path(desk.site.state).glob("jobs/*"))
    job = book(desk).named(JOB)
    assert book(desk).settings_of(job) == shared_settings(desks.settings()) and job.base == base_digest(desk.site.model)
    decide(desk, JOB)
    assert not error(ask(desk, "hello")) and ask(desk, "turn").payloads, "the worker sees it without a restart"
    assert standings(desk) == ["approved"]
    ask(desk, "deliver", counted=1)
    assert standings(desk) == ["done"]


@pytest.mark.parametrize(
    ("overrides", "job"), [((), OTHER), (("training.max_steps=11",), JOB), (("federation.num_rounds=99",), JOB)]
)
def test_another_name_or_other_settings_ask_anew(desk, overrides, job):
    ask(desk, "hello"), decide(desk, JOB)
    assert ask(desk, "turn").payloads
    for what in ("hello", "turn", "deliver"):
        assert error(ask(desk, what, *overrides, job=job, round=2)) == WAITS
    assert standings(desk) == ["approved", "waiting"] and ask(desk, "turn", round=2, counted=1).payloads
    if job == JOB:  # the name alone does not say which settings were looked at
        with pytest.raises(ConfigError, match="may be 2 jobs: give more of the name"):
            book(desk).named(JOB)


def test_a_refusal_counts_at_once_and_may_say_why(desk):
    ask(desk, "hello"), decide(desk, JOB)
    assert ask(desk, "turn").payloads
    decide(desk, JOB, "refused", reason="not in our contract")
    for what in ("hello", "turn", "deliver"):
        assert error(ask(desk, what)) == "refused by a person at the site: not in our contract"
    decide(desk, JOB)
    assert ask(desk, "turn").payloads


def test_a_refusal_while_a_turn_trains_keeps_its_update_here(desk, monkeypatch):
    ask(desk, "hello"), decide(desk, JOB)
    trained = desk.training

    def refuse_meanwhile(*arguments):
        decide(desk, JOB, "refused")
        return trained(*arguments)

    monkeypatch.setattr(desk, "training", refuse_meanwhile)
    assert error(ask(desk, "turn")) == "refused by a person at the site" and not desk.trail.lines()
    decide(desk, JOB)
    assert ask(desk, "turn").payloads and len(desk.trail.lines()) == 1


def test_an_approval_ends_with_its_rounds(desk):
    ask(desk, "hello"), decide(desk, JOB, rounds=1)
    first = ask(desk, "turn").payloads
    assert first and ask(desk, "turn").payloads == first, "the same bytes again are no further round"
    over = "the approval by a person at the site was for 1 round, and that is over"
    assert error(ask(desk, "turn", round=2, counted=1)) == over
    assert not error(ask(desk, "deliver", counted=1)), "nothing leaves for the result"
    decide(desk, JOB, rounds=2)
    assert ask(desk, "turn", round=2, counted=1).payloads and error(ask(desk, "turn", round=3, counted=2))


def test_without_a_number_no_more_updates_leave_than_the_job_has_rounds(desk):
    ask(desk, "hello", "federation.num_rounds=1"), decide(desk, JOB)
    assert ask(desk, "turn", "federation.num_rounds=1").payloads
    asked = Request("turn", JOB, shared_settings(desks.settings("federation.num_rounds=1")), "")
    with pytest.raises(PolicyRefusal, match="1 updates .* have left, and 1 were approved"):
        book(desk).check_updates(asked, desk.trail.payloads_of(JOB), 1)


def test_an_approval_ends_with_its_date(desk):
    ask(desk, "hello")
    decide(desk, JOB, until=time_text(datetime.now(UTC) + timedelta(hours=1)))
    assert ask(desk, "turn").payloads
    decide(desk, JOB, until="2026-01-01T00:00:00+00:00")
    assert error(ask(desk, "turn", round=2)).startswith("the approval by a person at the site ended at 2026-01-01")
    assert standings(desk) == ["over"] and not error(ask(desk, "deliver", counted=1))


def test_a_date_is_the_end_of_its_day_and_not_over_yet():
    assert parse_until("2026-11-28T12:00:01+00:00", NOW) == NOW + timedelta(seconds=1)
    assert (parse_until("2026-12-31", NOW).astimezone()).strftime("%H:%M:%S") == "23:59:59"
    for wrong in ("2026-11-27", "tomorrow", "2026-11-28T12:00:00+00:00"):
        with pytest.raises(ConfigError, match="--until"):
            parse_until(wrong, NOW)


def test_a_line_that_a_crash_cut_short_is_none_and_is_taken_off(desk):
    ask(desk, "hello")
    path = Path(desk.site.state) / "jobs.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + whole.replace(b"asked", b"approved")[:-1])
    assert error(ask(desk, "hello")) == WAITS, "half an approval is none, even if only its newline is missing"
    decide(desk, JOB)
    assert path.read_bytes().startswith(whole) and path.read_bytes().count(b"\n") == 2
    assert not error(ask(desk, "hello"))
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_book_that_cannot_be_read_allows_nothing(desk):
    ask(desk, "hello"), decide(desk, JOB)
    path = Path(desk.site.state) / "jobs.jsonl"
    path.write_bytes(path.read_bytes() + b'{"event": "approved"}\n')
    assert "SiteError" in error(ask(desk, "hello")) and desk.place is None
    with pytest.raises(SiteError, match="line 3 is not a line of a book of jobs"):
        book(desk).jobs()


def test_settings_that_were_altered_are_not_shown(desk):
    ask(desk, "hello")
    job = book(desk).named(JOB)
    kept = Path(desk.site.state) / "requests" / f"{job.settings}.toml"
    kept.write_text(kept.read_text().replace("max_steps = 10", "max_steps = 1"))
    with pytest.raises(SiteError, match="was altered"):
        book(desk).settings_of(job)


def test_a_server_cannot_fill_the_book(desk):
    for number in range(MOST_WAITING + 2):
        reply = ask(desk, "hello", job=f"{number:016x}")
    assert error(reply) == f"too many jobs wait for a person at the site ({MOST_WAITING})"
    assert len(book(desk).jobs()) == MOST_WAITING


def test_what_policy_refuses_is_not_put_before_a_person(tmp_path):
    desk = Desk(desks.site("lab", tmp_path, Policy(approve="ask", max_rank=8)))
    assert "max_rank" in error(ask(desk, "hello")) and not book(desk).jobs()


def test_a_run_goes_on_without_the_site_and_takes_it_in_once_it_is_allowed(toy_federation, tmp_path, monkeypatch):
    monkeypatch.setattr("fedloom.flower.fleet.GREET_SECONDS", 0.01)
    grid = desks.DeskGrid(desks.settings(), tmp_path, policies={"bank": ASK})

    def allow(node, asked, round, reply):
        bank = grid.node("bank").desk
        if (asked, round) == ("turn", 1) and standings(bank) == ["waiting"]:
            decide(bank, book(bank).jobs()[0].name)
        return reply

    grid.disturb = allow
    toy_federation("flower.min_replies=2", grid=grid)
    rows = [row for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Roll)]
    asked = [(site, what) for site, what, _ in grid.log]
    assert ("depot", "turn") in asked[: asked.index(("bank", "turn"))] and rows[-1].answered == desks.SITES
    said = [
        row.missing.get("bank", "") for row in read_rows(tmp_path / "run" / "ledger.jsonl") if isinstance(row, Presence)
    ]
    assert any(WAITS in reason for reason in said), "under the site's name"


def test_by_default_nobody_is_asked_and_the_book_is_kept_all_the_same(desk, tmp_path):
    free = Desk(desks.site("depot", tmp_path, Policy(order="run")))
    assert ask(free, "turn").payloads and not error(ask(free, "hello")) and not error(ask(free, "hello"))
    ask(free, "deliver", counted=1)
    lines = (Path(free.site.state) / "jobs.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["asked", "begun", "done"]
    said = read_presence(Path(free.site.state))
    assert said is not None and (said.ask, said.job, said.round) == ("deliver", JOB, 1) and said.answered
    free.close()


def test_a_folder_that_is_taken_away_is_begun_anew(desk):
    desk.jobs.ask = False
    ask(desk, "hello")
    first = ask(desk, "turn").payloads
    folder = Path(desk.site.state) / "jobs" / JOB
    folder.rename(folder.with_name("gone"))
    assert ask(desk, "hello").facts["version"] == 0
    assert ask(desk, "turn").payloads == first and (folder / "ledger.jsonl").stat().st_size > 0


@pytest.mark.parametrize(("days", "words"), [(3.51, "behind"), (-3.51, "ahead of")])
def test_a_clock_that_is_days_off_is_noticed_at_the_start(desk, caplog, days, words):
    desk.jobs.ask = False
    now = datetime.now(UTC).timestamp()
    with caplog.at_level(logging.WARNING):
        ask(desk, "hello", time=now + 60.0, protocol=2)
        assert not caplog.records
        ask(desk, "hello", time=now + days * 86400, protocol=2)
    assert "clock is 3 days, 12:" in caplog.text and f"{words} the server's" in caplog.text


def test_greetings_carry_the_servers_time(toy_federation, tmp_path, caplog, monkeypatch):
    grid, heard = desks.DeskGrid(desks.settings(), tmp_path), []
    answer = grid.node("bank").desk.answer

    def listen(parcel: Parcel, *waited: float) -> Parcel:
        heard.append(parcel.facts)
        return answer(parcel, *waited)

    monkeypatch.setattr(grid.node("bank").desk, "answer", listen)
    with caplog.at_level(logging.WARNING):
        toy_federation(grid=grid)
    told = {str(facts["ask"]): facts.get("time") for facts in heard}
    assert abs(told["hello"] - datetime.now(UTC).timestamp()) < 300 and told["turn"] is None
    assert "clock" not in caplog.text
