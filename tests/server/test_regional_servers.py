"""A run with regional servers in the local engine: its ledger by level, its resumption, and settings that cannot be."""

from __future__ import annotations

import tomllib
from collections import Counter
from pathlib import Path

import pytest

from fedloom.errors import ConfigError
from fedloom.flower.settings import check_flower_settings
from fedloom.methods.table import build
from fedloom.records.configfile import dump, load_config, parse
from fedloom.records.ledger import Aggregation, Note, Relay, Training, Transfer, read_rows, totals
from fedloom.report.tables import region_sentence
from fedloom.server.loop import Rounds
from fedloom.workspace.regions import plan_regions, split_evenly
from fedloom.workspace.resumption import dump_fixed
from toy import initial
from toy_run import count_bytes, simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
BROADCASTS = ("change", "state")
CLIENTS = [f"client-{number:04d}" for number in range(6)]


def configure(*settings):
    fixed = ["federation.num_rounds=4", "federation.eval_every=0", "method.name=fedit", "federation.regions=2"]
    return load_config(TESTBED / "demo.toml", [*fixed, *settings])


def play(config, folder, *, resume=False):
    with simulation(toy_setup(config, len(CLIENTS), initial()), folder, resume=resume) as run:
        run.play(resume=resume)
    return run, read_rows(folder / "ledger.jsonl")


def test_bytes_by_level(tmp_path, monkeypatch):
    crossed = count_bytes(monkeypatch)
    _, rows = play(configure(), tmp_path / "run")
    sums = totals(rows)
    relays = [row for row in rows if isinstance(row, Relay)]
    assert crossed["up"] == sums.bytes_up and crossed["down"] == sums.bytes_down, "the clients' lines are as without"
    assert sums.by_level == {
        "clients": (sums.bytes_up, sums.bytes_down),
        "regions": tuple(sum(row.bytes for row in relays if row.direction == way) for way in ("up", "down")),
    }
    assert sums.by_region.keys() == {"region-1", "region-2"}
    kinds = Counter((row.region, row.kind, row.delivery) for row in relays)
    for region in sums.by_region:
        assert kinds[region, "facts", False] == kinds[region, "shares", False] == kinds[region, "sum", False] == 4
        down = Counter(row.delivery for row in relays if row.region == region and row.kind in BROADCASTS)
        assert down == {False: 3, True: 1}, "each broadcast once, whatever the number of clients"
    sent = {row.bytes for row in rows if isinstance(row, Transfer) and row.direction == "down"}
    assert {row.bytes for row in relays if row.kind in BROADCASTS} <= sent, "the region hands on the same bytes"
    up = sum(row.bytes for row in relays if row.kind == "sum")
    assert 2 / 6 * sums.bytes_up < up < 1.2 * 2 / 6 * sums.bytes_up, "two sums in place of six dense updates"
    assert "Between 2 regional servers and the root" in region_sentence(totals(rows).by_region)


def test_without_regions_a_run_is_as_it_was(tmp_path):
    with_regions, without = configure(), configure("federation.regions=null")
    assert "regions" not in dump_fixed(without) and "regions" in dump_fixed(with_regions)
    _, rows = play(without, tmp_path / "run")
    assert not [row for row in rows if isinstance(row, Relay)] and not totals(rows).by_region
    assert region_sentence(totals(rows).by_region) == ""


def test_a_run_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    config = configure("federation.fraction_train=0.5", "federation.drop_out=0.2", "federation.num_rounds=6")
    whole, rows = play(config, tmp_path / "whole")
    play_round = Rounds.play_round

    def crash(self, round):
        play_round(self, round)
        if round == 3:
            raise KeyboardInterrupt  # after the round's rows, before its checkpoint

    monkeypatch.setattr(Rounds, "play_round", crash)
    with pytest.raises(KeyboardInterrupt):
        play(config, tmp_path / "broken")
    monkeypatch.undo()
    resumed, again = play(config, tmp_path / "broken", resume=True)
    assert (resumed.server.version, resumed.server.digest) == (whole.server.version, whole.server.digest)
    assert totals(again) == totals(rows)
    kept = [[row for row in one if isinstance(row, Relay)] for one in (rows, again)]
    assert kept[0] == kept[1] and kept[0]


def test_a_region_nobody_of_which_answers(tmp_path):
    """One client a round: the other region is silent, and a round without anybody is skipped as ever."""
    config = configure("federation.fraction_train=0.1", "federation.drop_out=0.3", "federation.num_rounds=8")
    _, rows = play(config, tmp_path / "run")
    skipped = {row.round for row in rows if isinstance(row, Note) and "nobody answered" in row.text}
    asked = {row.round: row.client for row in rows if isinstance(row, Training)}
    sums = {row.round: row.region for row in rows if isinstance(row, Relay) and row.kind == "sum"}
    assert skipped and sums == {round: f"region-{1 + (CLIENTS.index(client) >= 3)}" for round, client in asked.items()}
    assert {row.round for row in rows if isinstance(row, Aggregation)} == set(asked)


def test_regions_by_name_come_back_from_their_file():
    tree = {"federation": {"regions": {"north": ["a", "b"], "south": ["c"]}}, "training": {"max_steps": 1}}
    config = parse({**tree, "data": {"source": "x.jsonl"}}, "a test")
    assert config.federation.regions == {"north": ("a", "b"), "south": ("c",)}
    assert plan_regions(config.federation.regions, ["a", "b", "c"], build("ffa"))["south"] == ("c",)
    assert parse(tomllib.loads(dump(config)), "its dump") == config


@pytest.mark.parametrize(("number", "sizes"), [(1, [6]), (4, [1, 2, 1, 2]), (6, [1] * 6)])
def test_regions_by_number(number, sizes):
    regions = split_evenly(number, CLIENTS)
    assert [len(own) for own in regions.values()] == sizes
    assert [client for own in regions.values() for client in own] == CLIENTS


@pytest.mark.parametrize(
    ("regions", "method", "words"),
    [
        (7, "fedit", "federation.regions is 7, but there are 6 clients"),
        ({"north": CLIENTS[:5]}, "fedit", "no region for client-0005"),
        ({"north": CLIENTS, "south": CLIENTS[:1]}, "fedit", "names 'client-0000' 2 times"),
        ({"north": [*CLIENTS, "client-000"]}, "fedit", "'client-000', which is no client.*did you mean 'client-000"),
        (
            2,
            "fedsrd",
            "method 'fedsrd' do not add.*one of fed-dare, fedit, fedprox, fedsvd, ffa, flasc, loom, lora-xs, rolora",
        ),
        (2, "fed-sb", "method 'fed-sb' do not add"),
    ],
)
def test_regions_that_cannot_be(regions, method, words):
    with pytest.raises(ConfigError, match=words):
        plan_regions(regions, CLIENTS, build(method))


@pytest.mark.parametrize(("value", "words"), [("0", "federation.regions"), ("{north=[]}", "federation.regions")])
def test_a_setting_of_no_region_is_refused(value, words):
    with pytest.raises(ConfigError, match=words):
        configure(f"federation.regions={value}")


def test_across_machines_regions_are_refused():
    config = configure("federation.participants=['a','b']", "federation.num_clients=null", "federation.regions=2")
    with pytest.raises(ConfigError, match="federation.regions is for simulations"):
        check_flower_settings(config)
