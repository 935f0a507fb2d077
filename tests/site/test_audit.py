"""Everything that left is on record, and a record that was touched is found out."""

import hashlib
import io
import json
import math
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from fedloom.cli.inspect import describe_path
from fedloom.errors import AuditError
from fedloom.site import audit, clock
from fedloom.site.audit import FIRST, AuditTrail

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture
def trail(tmp_path):
    made = AuditTrail(tmp_path / "audit")
    for number in range(4):
        made.record(bytes([number]) * (10 + number), "job-a", number // 2 + 1, None, NOON + timedelta(hours=8 * number))
    return made


def rewritten(trail, change):
    lines = [json.loads(text) for text in trail.path.read_text().splitlines()]
    change(lines)
    trail.path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_lines_name_the_payload_and_the_line_before(trail):
    lines, moved, unlisted = trail.verify()
    assert not unlisted
    assert [line.bytes for line in lines] == [10, 11, 12, 13] and not moved
    assert [line.previous for line in lines] == [FIRST, *(line.digest for line in lines[:-1])]
    assert (trail.folder / "payloads" / lines[2].payload).read_bytes() == b"\x02" * 12
    assert trail.path.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize(
    "change",
    [
        lambda lines: lines[1].update(bytes=1),
        lambda lines: lines[3].update(round=9),
        lambda lines: lines[0].update(mu=0.5),
        lambda lines: lines.pop(0),
        lambda lines: lines.pop(2),
        lambda lines: lines.insert(1, dict(lines[0])),
        lambda lines: lines.reverse(),
        lambda lines: lines[2].update(digest=lines[1]["digest"]),
        lambda lines: lines[2].pop("time"),
        lambda lines: lines[2].update(note="nothing to see"),
    ],
)
def test_an_altered_record_is_found_out_and_not_written_on(trail, change):
    rewritten(trail, change)
    with pytest.raises(AuditError, match=r"audit\.jsonl"):
        trail.verify()
    with pytest.raises(AuditError):
        trail.record(b"more", "job-a", 3, None)
    with pytest.raises(AuditError):
        trail.count_spent("job-a", 3)


@settings(max_examples=60)
@given(data=st.data())
def test_any_changed_byte_is_found_out(tmp_path_factory, data):
    trail = AuditTrail(tmp_path_factory.mktemp("audit"))
    for number in range(3):
        trail.record(b"x" * number, "job", number, 0.5, NOON)
    content = bytearray(trail.path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    trail.path.write_bytes(content)
    with suppress(AuditError):
        assert [line.bytes for line in trail.verify()[0]] == [0, 1, 2] and _same_meaning(content)


def _same_meaning(content):
    """JSON allows some bytes to differ, such as a tab for a space; the fields must then be those written."""
    rows = [json.loads(text) for text in bytes(content).splitlines()]
    return [(row["job"], row["round"], row["mu"]) for row in rows] == [("job", number, 0.5) for number in range(3)]


def test_an_altered_payload_is_found_out_and_one_moved_away_is_told(trail):
    lines, _, _ = trail.verify()
    kept = trail.folder / "payloads" / lines[1].payload
    kept.rename(trail.folder.parent / "elsewhere")
    assert trail.verify()[1] == [lines[1]]
    kept.write_bytes(b"something else")
    with pytest.raises(AuditError, match="round 1 of job job-a"):
        trail.verify()


def test_a_line_cut_short_by_a_crash_is_dropped(trail):
    whole = trail.path.read_bytes()
    trail.path.write_bytes(whole[:-5])
    assert len(trail.lines()) == 3
    trail.record(b"again", "job-b", 1, None, NOON)
    assert [line.job for line in trail.verify()[0]] == ["job-a"] * 3 + ["job-b"]


def test_a_last_line_without_its_newline_counts(trail):
    """Taking one byte off would take a charge back otherwise."""
    trail.record(b"noisy", "job-b", 1, 0.5, NOON)
    trail.path.write_bytes(trail.path.read_bytes()[:-1])
    assert trail.count_spent("job-b", 1).mu_squared == 0.25 and len(AuditTrail(trail.folder).verify()[0]) == 5
    trail.record(b"more", "job-b", 2, 0.5, NOON)
    assert [line.round for line in AuditTrail(trail.folder).lines()] == [1, 1, 2, 2, 1, 2]


@pytest.mark.parametrize(
    "harm", [lambda text: text[:-1] + b"x", lambda text: text[:-1] + b"{", lambda text: text + b"}"]
)
def test_a_last_line_that_no_crash_could_leave_is_found_out(trail, harm):
    trail.path.write_bytes(harm(trail.path.read_bytes()))
    with pytest.raises(AuditError, match=r"line [45]"):
        AuditTrail(trail.folder).lines()
    with pytest.raises(AuditError, match=r"line [45]"):
        trail.record(b"more", "job-b", 2, 0.5, NOON)


@pytest.mark.parametrize(
    "saved",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b": ", b":").replace(b", ", b","),
        lambda text: text.replace(b": ", b":   "),
        lambda text: text.replace(b"\n", b"\r\n")[:-1],
        lambda text: text.replace(b"\n", b"\r\n") + b'{"time": "2026-',
    ],
)
@pytest.mark.parametrize("fresh", [False, True])
def test_a_record_that_an_editor_saved_otherwise_is_written_on_in_the_right_place(trail, saved, fresh):
    digests = [line.digest for line in trail.lines()]
    trail.path.write_bytes(saved(trail.path.read_bytes()))
    written = AuditTrail(trail.folder) if fresh else trail
    for number in range(3):
        written.record(bytes([9, number]), "job-b", number + 1, None, NOON)
    lines = AuditTrail(trail.folder).lines()
    assert [line.digest for line in lines[:4]] == digests and [line.round for line in lines[4:]] == [1, 2, 3]
    assert written.lines() == lines


def test_a_line_is_checked_once_while_nobody_else_writes(trail, monkeypatch):
    checked = []
    digest = audit._digest
    monkeypatch.setattr(audit, "_digest", lambda line: checked.append(line.round) or digest(line))
    fresh = AuditTrail(trail.folder)
    for number in range(20):
        fresh.count_spent("job-b", number)
        fresh.record(bytes([7, number]), "job-b", 100 + number, None)
    # 4 lines were there; of each of the 20 the digest is made when it is written, and checked when it is read back.
    assert len(checked) <= 4 + 2 * 20
    other = AuditTrail(trail.folder)
    other.record(b"of another process", "job-c", 7, None)
    assert fresh.lines() == other.lines()


def test_lines_that_were_checked_are_checked_again_after_a_change(trail):
    """Of the same length, so that neither the size nor the last line tells."""
    before = trail.lines()
    content = trail.path.read_bytes()
    trail.path.write_bytes(content.replace(b'"round": 1', b'"round": 7', 1))
    with pytest.raises(AuditError, match="line 1"):
        trail.lines()
    trail.path.write_bytes(content)
    assert trail.lines() == before
    trail.path.write_bytes(content[: content.index(b"\n") + 1])
    assert trail.lines() == before[:1]


def test_times_do_not_run_backwards(tmp_path):
    """A clock that was set back and right again would take bytes out of the day."""
    trail = AuditTrail(tmp_path)
    trail.record(b"x" * 10, "job", 1, None, NOON)
    trail.record(b"y" * 10, "job", 2, None, NOON - timedelta(hours=25))
    assert [line.time for line in trail.lines()] == [NOON.isoformat(timespec="seconds")] * 2
    assert trail.count_spent("job", 3, NOON + timedelta(hours=1)).bytes_day == 20


def test_a_clock_that_is_set_does_not_empty_the_day(tmp_path, monkeypatch, caplog):
    system, up = [NOON], [1000.0]

    class Set(datetime):
        @classmethod
        def now(cls, tz=None):
            return system[0]

    monkeypatch.setattr(clock, "datetime", Set)
    monkeypatch.setattr(clock, "uptime", lambda: up[0])
    trail = AuditTrail(tmp_path)
    trail.record(b"x" * 10, "job", 1, None)
    system[0] += timedelta(hours=25)
    up[0] += 60
    assert trail.count_spent("job", 2).bytes_day == 10 and "was set" in caplog.text
    trail.record(b"y" * 10, "job", 2, None)
    assert trail.lines()[-1].time == (NOON + timedelta(minutes=1)).isoformat(timespec="seconds")
    system[0] -= timedelta(hours=50)
    assert trail.count_spent("job", 3).bytes_day == 20
    system[0], up[0] = NOON + timedelta(hours=25), 1000.0 + 25 * 3600
    assert trail.count_spent("job", 3).bytes_day == 0
    assert caplog.text.count("was set") == 1


def test_bytes_of_a_round_and_of_the_last_day_are_counted(trail):
    spent = trail.count_spent("job-a", 2, NOON + timedelta(hours=25))
    assert (spent.bytes_round, spent.bytes_day, spent.mu_squared) == (25, 36, 0.0)
    assert trail.count_spent("job-b", 2, NOON + timedelta(days=9)).bytes_day == 0


def test_a_payload_sent_twice_costs_its_privacy_once(tmp_path):
    trail = AuditTrail(tmp_path)
    for payload in (b"one", b"one", b"two"):
        trail.record(payload, "job", 1, 0.5)
    spent = trail.count_spent("job", 1)
    assert spent.bytes_round == 9 and math.isclose(spent.mu_squared, 0.5)


def test_a_draw_of_noise_is_counted_whether_or_not_its_payload_leaves(tmp_path):
    trail = AuditTrail(tmp_path)
    trail.charge("job", 1, 0.5, NOON)
    assert trail.count_spent("job", 1).mu_squared == 0.25 and trail.count_spent("job", 1).bytes_round == 0
    drawn = trail.charge("job", 1, 0.5, NOON)
    for _ in range(2):
        trail.record(b"noisy", "job", 1, 0.5, NOON, drawn.digest)
    assert trail.count_spent("job", 1).mu_squared == 0.5 and trail.count_spent("job", 1).bytes_round == 10
    lines, moved, unlisted = trail.verify()
    assert len(lines) == 4 and not moved and not unlisted


def test_equal_payloads_of_different_draws_cost_each_their_own(tmp_path):
    trail = AuditTrail(tmp_path)
    for number in range(3):
        job = f"job-{number}"
        trail.record(b"equal", job, 1, 0.5, NOON, trail.charge(job, 1, 0.5, NOON).digest)
    assert trail.count_spent("job", 1).mu_squared == 0.75


@pytest.mark.parametrize(
    "fields",
    [
        {"charge": FIRST},
        {"round": 2},
        {"job": "other"},
        {"mu": 0.4},
        {"payload": b"another payload with the same draw"},
    ],
)
def test_a_payload_whose_noise_was_not_charged_for_is_found_out(tmp_path, fields):
    trail = AuditTrail(tmp_path)
    drawn = trail.charge("job", 1, 0.5, NOON)
    said = {"payload": b"noisy", "job": "job", "round": 1, "mu": 0.5, "charge": drawn.digest}
    trail.record(**said, now=NOON)
    assert len(trail.verify()[0]) == 2
    trail.record(**{**said, **fields}, now=NOON)
    with pytest.raises(AuditError, match="line 3 names a charge"):
        trail.verify()


def test_a_payload_without_a_line_is_told(trail):
    whole = trail.path.read_bytes()
    trail.path.write_bytes(whole[: whole.rindex(b"\n", 0, -1) + 1])
    lines, _, unlisted = trail.verify()
    assert len(lines) == 3 and len(unlisted) == 1
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(describe_path(trail.folder))
    assert unlisted[0] in console.export_text()


def test_lines_of_records_from_before_there_were_charges_keep_their_digests(trail):
    trail.record(b"noisy", "job-b", 1, 0.5, NOON)
    assert "charge" not in trail.path.read_text()
    line = json.loads(trail.path.read_text().splitlines()[-1])
    said = {key: value for key, value in line.items() if key != "digest"}
    assert line["digest"] == hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    assert trail.count_spent("job-b", 1).mu_squared == 0.25


def test_nothing_leaves_where_it_cannot_be_recorded(tmp_path):
    (tmp_path / "audit").write_text("a file where the folder should be")
    with pytest.raises(AuditError, match="nothing leaves"):
        AuditTrail(tmp_path / "audit").record(b"x", "job", 1, None)
    with pytest.raises(AuditError, match="nothing leaves"):
        AuditTrail(tmp_path / "audit").charge("job", 1, 0.5)


def test_inspect_shows_the_record_and_what_the_noise_is_worth(trail):
    trail.record(b"noisy", "job-b", 1, 0.5, NOON)
    console = Console(record=True, width=200, file=io.StringIO())
    console.print(describe_path(trail.folder))
    text = console.export_text()
    assert "job-a" in text and "46" in text and trail.lines()[-1].digest in text
    assert "μ = 0.5" in text and "4 payloads left without noise" in text
