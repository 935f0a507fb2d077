"""What a round says of itself: how much clients agree, what every module was sent, where its time went."""

import math
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedloom.compress.entries import Dense, Sparse, to_dense
from fedloom.compress.quantize import quantize
from fedloom.lora.pair import module_of
from fedloom.methods.method import FROZEN
from fedloom.methods.table import build
from fedloom.rounds import turns
from fedloom.rounds.decoded import Decoded
from fedloom.rounds.facts import TOLD, describe_modules, is_told
from fedloom.rounds.turns import client_turn, server_turn, start
from fedloom.wire import decode
from toy import SHAPES, initial, job, ranks, trainer


def played(method="fedit", clients=4, values="fp32", **options):
    """(the job, the server's state, the payloads of a first round)."""
    made = job(build(method, options), values=values)
    own, first = ranks(4), initial()
    train = trainer(made.method)
    payloads = {}
    for number in range(clients):
        client = f"c{number}"
        payloads[client] = client_turn(made, client, start(made, first, own), [], train, 1).payload
    return made, start(made, first), payloads


def test_agreement_is_the_mean_cosine_to_the_mean():
    made, state, payloads = played()
    turn = server_turn(made, state, payloads, 1)
    rows = []
    for client in sorted(payloads):
        entries = decode(payloads[client]).entries
        rows.append(torch.cat([to_dense(entries[name]).flatten() for name in sorted(entries)]))
    mean = torch.stack(rows).mean(dim=0)
    slow = [float(row @ mean / row.norm() / mean.norm()) for row in rows]
    assert turn.facts.agreement == pytest.approx(sum(slow) / len(slow), rel=1e-4)
    norms = {client: float(row.norm()) for client, row in zip(sorted(payloads), rows, strict=True)}
    assert turn.facts.norms == pytest.approx(norms, rel=1e-4)


def test_agreement_holds_one_payload_at_a_time(monkeypatch):
    """It held those of all clients, up to eight, beside the state."""

    class Held(dict):
        """Entries that can be asked whether they are still there."""

    made, state, payloads = played()
    find, measure, gone = Decoded.entries, turns.measure_agreement, []

    def entries(decoded, client, *rest):
        assert all(one() is None for one in gone), "another payload is still in memory"
        found = Held(find(decoded, client, *rest))
        gone.append(weakref.ref(found))
        return found

    def measured(*given):
        with monkeypatch.context() as patched:
            patched.setattr(Decoded, "entries", entries)
            return measure(*given)

    monkeypatch.setattr(turns, "measure_agreement", measured)
    assert server_turn(made, state, payloads, 1).facts.agreement is not None and len(gone) == len(payloads)


def test_one_client_agrees_with_nobody():
    made, state, payloads = played(clients=1)
    assert server_turn(made, state, payloads, 1).facts.agreement is None


@pytest.mark.parametrize(("method", "values"), [("fedsrd", "int8"), ("florist", "int8"), ("flasc", "int4")])
def test_every_method_s_round_can_be_told(method, values):
    made, state, payloads = played(method, values=values)
    told = server_turn(made, state, payloads, 1).facts
    assert -1.0 <= told.agreement <= 1.0 + 1e-6
    assert set(told.modules.modules) == set(SHAPES)
    assert all(0 < density <= 1 for density in told.modules.densities) and all(n > 0 for n in told.modules.norms)
    assert set(told.stages) >= {"decode", "aggregate", "encode"} and min(told.stages.values()) >= 0
    if method == "florist":
        assert len(told.modules.kept) == len(SHAPES) and all(0 < share <= 1 for share in told.modules.kept)


def test_modules_are_described_by_what_is_sent():
    entries = {
        "m/A": Dense((2, 5), torch.ones(10)),
        "m/B": Sparse((6, 2), torch.tensor([0, 3]), torch.tensor([3.0, 4.0])),
        f"n/{FROZEN}B": Dense((4, 3), torch.zeros(12)),
    }
    told = describe_modules(entries, {"m": 0.75})
    assert (told.modules, told.ranks) == (("m", "n"), [2, 3])
    assert told.densities == [12 / 22, 1.0] and told.norms == pytest.approx([math.sqrt(35), 0.0])
    assert told.kept[0] == 0.75 and math.isnan(told.kept[1])
    assert {module_of(name) for name in entries} == set(told.modules)


@given(st.integers(1, 70), st.sampled_from(["fp32", "bf16", "int8", "int4"]))
def test_the_norm_is_that_of_the_values_whatever_their_coding(count, coding):
    values = quantize(coding)(torch.randn(count, generator=torch.Generator().manual_seed(count)), 1)
    entry = Dense((1, count), values)
    assert describe_modules({"m/A": entry}, {}).norms == pytest.approx([float(to_dense(entry).norm())], rel=1e-4)


@given(st.integers(1, 5000))
def test_a_run_of_any_length_tells_of_some_rounds_and_of_its_last(rounds):
    made = job(build("fedit", {}))
    object.__setattr__(made, "num_rounds", rounds)
    told = [round for round in range(1, rounds + 1) if is_told(made, round)]
    assert told[0] == 1 and told[-1] == rounds and min(rounds, TOLD // 2) <= len(told) <= TOLD + 2


def test_what_is_told_changes_no_byte(monkeypatch):
    made, state, payloads = played("fedsrd", values="int8")
    whole = server_turn(made, state, payloads, 1)
    monkeypatch.setattr("fedloom.rounds.turns.is_told", lambda job, round: False)
    plain = server_turn(made, state, payloads, 1)
    assert (whole.payload, whole.state.digest) == (plain.payload, plain.state.digest)
    assert plain.facts.modules is None and plain.facts.agreement is None


def test_a_turn_says_where_its_time_went():
    made, state, _ = played()
    turn = client_turn(made, "c9", start(made, initial(), ranks(4)), [], trainer(made.method), 1)
    assert set(turn.trained.stages) == {"decode", "compress", "encode"} and min(turn.trained.stages.values()) >= 0
