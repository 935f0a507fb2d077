"""Server and site of two releases: side by side where their protocols meet, a plain answer where they do not."""

from __future__ import annotations

from pathlib import Path

import desks
import pytest
from desks import settings

from fedloom.errors import RoundError, SiteError, VersionError
from fedloom.flower import fleet
from fedloom.flower import settings as shared
from fedloom.records.configfile import setting_keys
from fedloom.records.ledger import Roll, read_rows
from fedloom.rounds.catchup import Archive
from fedloom.site.desk import Desk
from fedloom.site.protocol import SPOKEN, Parcel, Spoken, parse_request, parse_statement, write_facts

pytestmark = pytest.mark.flower
NEXT, AFTER = Spoken(2, 3), Spoken(3, 4)
GREETING = {"ask": "hello", "job": "0" * 16, "settings": "", "base": "0" * 32, "round": 0}
KEYS_OF_1 = (Path(__file__).parents[1] / "golden" / "settings-of-protocol-1.txt").read_text().split()


def rolls(folder: Path) -> list[Roll]:
    return [row for row in read_rows(folder / "run" / "ledger.jsonl") if isinstance(row, Roll)]


def first_release(desk: Desk, monkeypatch) -> list[dict]:
    """Have a desk answer as fedloom did before protocols had numbers: it refuses facts that it does not know."""
    answer, heard = desk.answer, []

    def answer_of_old(parcel: Parcel) -> Parcel:
        heard.append(dict(parcel.facts))
        if unknown := set(parcel.facts) - {*GREETING, "counted"}:
            return Parcel({"error": f"no request that a worker knows: {min(unknown)}: Unexpected keyword argument"})
        reply = answer(parcel)
        return Parcel({name: fact for name, fact in reply.facts.items() if name != "protocol"}, reply.payloads)

    monkeypatch.setattr(desk, "answer", answer_of_old)
    return heard


def test_a_request_is_written_in_the_protocol_that_it_names():
    facts = {**GREETING, "time": 1.0, "expires": 9.0}
    assert write_facts(facts, 1) == GREETING, "what the release before knows, to the byte"
    assert write_facts(facts, 2) == {**facts, "protocol": 2}
    assert parse_request(GREETING).protocol == 1 and parse_statement({}).protocol == 1
    assert parse_request({**GREETING, "protocol": 2, "more": "x"}).protocol == 2, "what nobody knows is not looked at"


def test_protocols_that_do_not_meet_are_refused_in_plain_words():
    with pytest.raises(VersionError, match=r"the server speaks protocol 3, this site 1 and 2 \(fedloom .*the site$"):
        parse_request({"protocol": 3, "ask": "something new"})
    with pytest.raises(VersionError, match="the server speaks protocol 1, this site 3 and 4 .*: update the server"):
        parse_request(GREETING, AFTER)
    with pytest.raises(VersionError, match="the site speaks protocol 1, this server 3 and 4 .*: update the site"):
        AFTER.agree(1)
    with pytest.raises(SiteError, match="no request that a worker knows: protocol"):
        parse_request({**GREETING, "protocol": 2.5})


@pytest.mark.parametrize(("server", "site"), [(NEXT, SPOKEN), (SPOKEN, NEXT)], ids=["server first", "site first"])
def test_one_side_may_be_updated_before_the_other(toy_federation, tmp_path, monkeypatch, server, site):
    monkeypatch.setattr("fedloom.flower.fleet.SPOKEN", server)
    monkeypatch.setattr("fedloom.site.desk.SPOKEN", site)
    written = fleet.write_facts
    monkeypatch.setattr(fleet, "write_facts", lambda facts, protocol: {**written(facts, protocol), "weather": "new"})

    def say_more(node, ask, round, reply):
        return Parcel({**reply.facts, "mood": "new"}, reply.payloads)

    federation, grid = toy_federation(disturb=say_more)
    assert all(roll.answered == desks.SITES for roll in rolls(tmp_path)) and len(rolls(tmp_path)) == 3
    assert set(federation.sites.fleet.spoken.values()) == {2}
    greetings = [site for site, ask, _ in grid.log if ask == "hello"]
    assert len(greetings) == (6 if server is NEXT else 3), "a site that knows less is greeted again, in its protocol"


def test_a_site_of_the_release_before_takes_part(toy_federation, tmp_path, monkeypatch):
    grid = desks.DeskGrid(settings(), tmp_path)
    heard = first_release(grid.node("bank").desk, monkeypatch)
    federation, _ = toy_federation(grid=grid)
    assert all(roll.answered == desks.SITES for roll in rolls(tmp_path))
    assert sorted(federation.sites.fleet.spoken.values()) == [1, 2, 2]
    assert [facts["ask"] for facts in heard][:3] == ["hello", "hello", "turn"] and "protocol" not in heard[2]


def test_a_site_of_the_release_before_is_sent_every_broadcast_that_it_missed(toy_federation, tmp_path, monkeypatch):
    """It would refuse the newest alone as one that rests on a state that it does not have."""
    grid = desks.DeskGrid(settings(), tmp_path)
    first_release(grid.node("bank").desk, monkeypatch)
    asked, find = {}, Archive.payloads_for

    def look(archive, job, server, version, ranks, round, *, alone):
        asked.setdefault(alone, 0)
        asked[alone] += 1
        return find(archive, job, server, version, ranks, round, alone=alone)

    monkeypatch.setattr(Archive, "payloads_for", look)
    toy_federation(grid=grid)
    assert asked[True] == 2 * asked[False] > 0, "one of three sites"


@pytest.mark.parametrize(
    ("server", "site", "words"),
    [
        (AFTER, SPOKEN, "the site speaks protocol 2, this server 3 and 4"),
        (SPOKEN, AFTER, "the server speaks protocol 2, this site 3 and 4"),
    ],
)
def test_a_run_says_whose_version_is_too_old(toy_federation, monkeypatch, server, site, words):
    monkeypatch.setattr("fedloom.flower.fleet.SPOKEN", server)
    monkeypatch.setattr("fedloom.site.desk.SPOKEN", site)
    with pytest.raises(RoundError, match=words):
        toy_federation("flower.deadline=0.2")


def test_keys_that_the_release_before_lacks_are_marked_and_left_out_at_their_default(monkeypatch):
    told = {key for key in setting_keys() if key.partition(".")[0] not in shared.SERVERS_OWN}
    assert told - set(KEYS_OF_1) == set(shared.SINCE), "mark a new key in flower.settings.SINCE"
    config, changed = settings(), settings("training.warmup_ratio=0.25")
    whole = shared.shared_settings(config)
    monkeypatch.setitem(shared.SINCE, "training.warmup_ratio", 3)
    assert "warmup_ratio" in whole and "warmup_ratio" not in shared.shared_settings(config)
    assert "warmup_ratio = 0.25" in shared.shared_settings(changed)
    for each in (config, changed):
        assert shared.join_settings(shared.shared_settings(each), shared.server_settings(each)) == each


def test_a_site_names_the_key_that_it_does_not_know(toy_federation, tmp_path, monkeypatch):
    written = desks.shared_settings
    monkeypatch.setattr(
        desks, "shared_settings", lambda config: written(config).replace("[training]", "[training]\nbrand_new = true")
    )
    with pytest.raises(RoundError) as refused:
        toy_federation("flower.deadline=0.2")
    assert "the server's settings have the key 'training.brand_new', which this site (fedloom " in str(refused.value)
    assert "update the site" in str(refused.value) and "ConfigError" not in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "fedsrd"', 'name = "fedsrd"\nbrand_new = 1', "brand_new"),
        ('name = "fedsrd"', 'name = "loom-next"', "loom-next"),
        ("r = 16", 'r = "\\u001b[2J"', "does not take the server's settings"),
    ],
)
def test_other_news_in_settings_is_told_too(toy_federation, monkeypatch, old, new, words):
    written = desks.shared_settings
    assert old in written(settings())
    monkeypatch.setattr(desks, "shared_settings", lambda config: written(config).replace(old, new))
    with pytest.raises(RoundError, match=words) as refused:
        toy_federation("flower.deadline=0.2")
    assert str(refused.value).isprintable()
