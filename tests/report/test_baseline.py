"""The dense run that a run is compared with: played on a real run of dense FedIT, it is that run, byte for byte."""

import io
import itertools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fedloom.lora.pair import subset
from fedloom.records.configfile import load_config
from fedloom.records.ledger import Aggregation, ModuleGroup, RunRow, Training, Transfer, read_rows
from fedloom.report import summarise
from fedloom.report.baseline import DenseRun, group_modules, play_ledger
from fedloom.report.numbers import common_rank
from fedloom.report.tables import comparison_rows, cost_sentence, traffic_table
from fedloom.wire import describe
from fedloom.workspace import folder
from page_reading import page_text
from toy import SHAPES, initial
from toy_run import ToySetup, simulation, toy_setup

TESTBED = Path(__file__).parents[2] / "src" / "fedloom" / "testbeds"
WIDTH = sum(map(sum, SHAPES.values()))
FEDIT = ["method.name=fedit", "wire.values=fp32", "federation.eval_every=0", "data.heldout=null"]


def count_plain(patch: pytest.MonkeyPatch) -> None:
    """Have the ledger count payloads as they are before they are coded: four bytes a value, no header."""
    real = folder.transfer_row

    def plain(round, client, direction, payload):
        row = real(round, client, direction, payload)
        size = 4 * sum(tensor.values for tensor in describe(payload).tensors)
        return Transfer(row.round, row.client, row.direction, row.kind, size)

    patch.setattr(folder, "transfer_row", plain)


class PartSetup(ToySetup):
    """Clients train their own modules only."""

    def train(self, client):
        step = super().train(client)

        def train(state, round, seed):
            trained = step(state, round, seed)
            return type(trained)(
                subset(trained.adapter, self.sites[client].ranks), trained.num_examples, trained.loss, trained.steps
            )

        return train


def play(out, *settings, clients=4, ranks=None):
    """The report of a toy run; ranks: those of the clients in turn, by module."""
    config = load_config(TESTBED / "demo.toml", [*FEDIT, *settings])
    plain = toy_setup(config, clients, initial())
    sites = plain.sites
    if ranks:
        sites = {name: SimpleNamespace(ranks=own) for name, own in zip(sites, itertools.cycle(ranks), strict=False)}
    with simulation(PartSetup(config, plain.job, plain.initial, sites), out) as run:
        run.play(resume=False)
    return summarise(read_rows(out / "ledger.jsonl"))


SUBSETS = [dict.fromkeys(some, 4) for some in itertools.combinations(SHAPES, 2)]


@pytest.mark.parametrize(
    ("clients", "settings", "ranks"),
    [
        (4, ["federation.num_rounds=3"], None),
        (150, ["federation.num_rounds=1", "federation.fraction_train=0.02"], None),
        (20, ["federation.num_rounds=10", "federation.fraction_train=0.2"], None),
        (20, ["federation.num_rounds=10", "federation.fraction_train=0.3", "federation.drop_out=0.4"], None),
        (3, ["federation.num_rounds=9", "federation.fraction_train=0.3", "federation.drop_out=0.6"], None),
        (9, ["federation.num_rounds=8", "federation.fraction_train=0.2", "federation.drop_out=0.2"], SUBSETS),
        (9, ["federation.num_rounds=8", "federation.fraction_train=0.12"], [*SUBSETS[:1], {"layers.1.down": 4}]),
    ],
    ids=["all", "150", "20", "drop-outs", "rounds without anybody", "modules", "rare modules"],
)
def test_dense_fedit_is_its_own_baseline(clients, settings, ranks, tmp_path, monkeypatch):
    """150 clients at 2 % read 1791 % once: the delivery was counted in the run and not in its baseline."""
    count_plain(monkeypatch)
    report = play(tmp_path / "run", *settings, clients=clients, ranks=ranks)
    assert report.totals.bytes == report.baseline.bytes > 0
    assert report.totals.bytes_up == report.baseline.up
    assert sum(report.delivered.values()) == report.baseline.delivery > 0
    assert "100.0 % of the" in cost_sentence(report) and "dense fp32 FedIT of rank 4" in cost_sentence(report)


def test_whatever_a_run_sends_its_attendance_is_the_baselines(tmp_path, monkeypatch):
    """A method that merges and consolidates, at lower ranks, is held to FedIT's bytes in the same rounds."""
    attendance = ["federation.num_rounds=9", "federation.fraction_train=0.3", "federation.drop_out=0.3"]
    count_plain(monkeypatch)
    dense = play(tmp_path / "dense", *attendance, clients=10)
    small = play(
        tmp_path / "small",
        *attendance,
        *("method.name=florist", "method.client_init=merge_reinit", "federation.consolidate_every=2"),
        clients=10,
        ranks=[dict.fromkeys(SHAPES, rank) for rank in (4, 1, 2)],
    )
    assert small.baseline == dense.baseline
    assert "FedIT of rank 4 for all clients sends to and from the same clients in the same rounds" in cost_sentence(
        small
    )
    assert small.baseline.bytes == dense.totals.bytes != small.totals.bytes


def test_a_named_rank_holds_whatever_the_runs_own(tmp_path, monkeypatch):
    """A rank-1 run read 24 % of itself where it sends 1.5 % of rank 16."""
    count_plain(monkeypatch)
    report = play(tmp_path / "run", "output.baseline_r=64", "federation.num_rounds=2")
    assert "6.2 % of the" in cost_sentence(report) and "dense fp32 FedIT of rank 64" in cost_sentence(report)
    quarter = (ModuleGroup(WIDTH, 1),)
    sent = [Transfer(1, "a", "up", "update", WIDTH), Aggregation(1, version=1)]  # a quarter of 4 bytes a value
    sent.append(Transfer(1, "a", "down", "change", WIDTH, version=0, delivery=True))
    rows = [RunRow("fedit", "m", ("a",), 1, WIDTH, 0, {}, quarter, baseline_r=16), *sent]
    assert ": 1.6 % of the" in cost_sentence(summarise(rows))
    alone = [RunRow("fedit", "m", ("a",), 1, WIDTH, 0, {}, quarter), *sent]
    assert ": 25.0 % of the" in cost_sentence(summarise(alone))
    big = [RunRow("fedit", "m", ("a",), 1, 16 * WIDTH, 0, {}, (ModuleGroup(WIDTH, 16),)), *sent]
    table = comparison_rows({"small": [summarise(alone)], "large": [summarise(big)]})
    assert [row["of dense fp32, rank 16"] for row in table] == ["1.56 %", "1.56 %"]


def test_several_ranks_have_no_common_one():
    mixed = RunRow("fedit", "m", ("a",), 1, 50, 0, {}, (ModuleGroup(10, 1), ModuleGroup(10, 4)))
    old = RunRow("fedit", "m", ("a",), 1, 50, 0)
    one = RunRow("fedit", "m", ("a",), 1, 50, 0, {}, (ModuleGroup(10, 5),))
    named = RunRow("fedit", "m", ("a",), 1, 50, 0, {}, (ModuleGroup(10, 1), ModuleGroup(10, 4)), baseline_r=8)
    reports = [summarise([run]) for run in (mixed, old, one, named)]
    assert [common_rank([report]) for report in reports] == [None, None, 5, 8]
    assert common_rank([reports[2], reports[1]]) is None
    assert [report.baseline.rank for report in reports] == ["ranks 1 to 4", "the largest rank", "rank 5", "rank 8"]


def test_a_lost_answer_is_not_known_to_have_arrived():
    """Two modules, each trained by one client: a client that knows step 0 of 2 lacks both broadcasts."""
    groups = (ModuleGroup(10, 1, ("ada",)), ModuleGroup(30, 1, ("bob",)))
    run = RunRow("fedit", "m", ("ada", "bob"), 2, 40, 0, {}, groups)
    one, two = Training(1, "ada", 1.0, 1, 1), Training(2, "bob", 1.0, 1, 1)
    start = [one, Transfer(1, "ada", "up", "update", 1), Aggregation(1, version=1)]
    asked = Transfer(2, "bob", "down", "change", 1, version=0)
    again = [*start, asked, asked, two, Transfer(2, "bob", "up", "update", 1), Aggregation(2, version=3)]
    late = Transfer(2, "ada", "down", "state", 1, version=1, delivery=True)
    lost = Transfer(2, "bob", "down", "state", 1, version=-1, delivery=True)
    told = play_ledger([run, *again, late, lost], run)
    assert (told.up, told.down, told.delivery) == (4 * 40, 4 * (10 + 10), 4 * (30 + 40))
    both = [Transfer(2, "cyd", "down", "change", 1, version=v, delivery=True) for v in (0, 1)]
    assert play_ledger([run, *start, two, Aggregation(2, version=2), *both], run).delivery == 4 * 40


def test_an_older_ledger_still_has_a_report():
    """It tells neither modules nor versions nor what is the delivery."""
    rows = [RunRow("fedsrd", "m", ("ada", "bob"), 2, 100, 0, {"bob": 50})]
    for round, client in itertools.product((1, 2), ("ada", "bob")):
        if client == "ada" and round > 1:
            rows.append(Aggregation(1))
        rows += [Transfer(round, client, "down", "change", 40)] * (round > 1)
        rows += [Training(round, client, 1.0, 1, 1), Transfer(round, client, "up", "update", 40)]
    rows += [Aggregation(2), *(Transfer(2, client, "down", "change", 40) for client in ("ada", "bob"))]
    report = summarise(rows)
    assert report.delivered == {"ada": 40, "bob": 40}
    assert (report.baseline.up, report.baseline.down, report.baseline.delivery) == (1600, 800, 800)
    assert "10.0 % of the 3.1 KiB that dense fp32 FedIT of the largest rank for all clients" in cost_sentence(report)
    assert "own data" not in cost_sentence(report)


def test_the_delivery_has_a_column_of_its_own(tmp_path):
    """150 clients of 3 turns: 292.3 KiB "down / turn" was the result to everybody, over three."""
    report = play(tmp_path / "run", "federation.num_rounds=1", "federation.fraction_train=0.02", clients=150)
    console = Console(file=io.StringIO(), width=120)
    console.print(traffic_table(report))
    lines = [line.split() for line in console.file.getvalue().splitlines() if line.split()]
    head, every = lines[1], lines[-1]
    assert head[-9:] == ["up", "/", "turn", "down", "/", "turn", "delivery", "in", "all"] or "delivery" in head
    assert every[:2] == ["all", "3"] and every[4:6] == ["0", "B"], "nothing came down before the turns of round 1"
    assert len(report.delivered) == 150
    assert "<th scope=col>delivery</th>" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def test_the_clients_own_data_stand_beside():
    run = RunRow("fedit", "m", ("a", "b"), 1, 100, 0, {}, (ModuleGroup(100, 1),), None, {"a": 1024, "b": 3072}, "xz")
    rows = [run, Transfer(1, "a", "up", "update", 2048)]
    report = summarise(rows)
    assert "That is 0.5 times the clients' own data: 4.0 KiB by xz, 2.0 KiB a client." in cost_sentence(report)
    assert "the clients&#x27; own data 4.0 KiB by xz" in page_text(rows)


def test_modules_are_grouped_by_who_trains_them():
    placed = {"a": ((2, 3), 4), "b": ((1, 1), 4), "c": ((5, 5), 2), "d": ((1, 2), 4)}
    everywhere = group_modules(placed, {"x": list("abcd"), "y": list("abcd")})
    assert everywhere == (ModuleGroup(10, 4), ModuleGroup(10, 2))
    parts = group_modules(placed, {"x": list("abcd"), "y": ["a"]})
    assert parts == (ModuleGroup(5, 4), ModuleGroup(5, 4, ("x",)), ModuleGroup(10, 2, ("x",)))


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 3), st.sets(st.sampled_from("abc"), min_size=1)), min_size=1),
    st.lists(st.sets(st.sampled_from("abc"), min_size=1), max_size=6),
)
def test_a_dense_run_is_what_a_slow_twin_counts(groups, rounds):
    """Payloads module by module, as a dictionary; a client of every round fetches in the end from every step."""
    play, made = DenseRun([ModuleGroup(width, rank, tuple(sorted(held))) for width, rank, held in groups]), []
    for clients in rounds:
        play.advance(clients)
        made.append(Counter({k: 4 * w * r for k, (w, r, held) in enumerate(groups) if held & clients}))
    whole = sum(4 * w * r for w, r, _ in groups)
    for known in range(len(rounds) + 1):
        before = play.down
        play.fetch(known)
        assert play.down - before == min(whole, sum(sum(change.values()) for change in made[known:]))
    for client in "abc":
        before = play.up
        play.send(client)
        assert play.up - before == sum(4 * w * r for w, r, held in groups if client in held)
