"""What a round comes to as numbers: from rows alone, once it is over, with no name of a client."""

from __future__ import annotations

import math

from fedloom.records.ledger import Aggregation, Evaluation, Note, Relay, Roll, Row, Training, Transfer, Validation
from fedloom.trackers.points import Rounds

CLIENTS = ("northern-clinic", "st-mary")


def rounds_of(rows: list[Row]) -> Rounds:
    found = Rounds()
    for row in rows:
        found.take(row)
    return found


def round_of(number: int) -> list[Row]:
    return [
        Transfer(number, CLIENTS[0], "down", "delta", 100, version=number - 1),
        Transfer(number, CLIENTS[1], "down", "delta", 100, version=number - 1),
        Training(number, CLIENTS[0], 2.0, 3, 7, seconds=1.5),
        Transfer(number, CLIENTS[0], "up", "update", 30),
        Note(number, "client st-mary refused: too large", "refused"),
        Roll(number, CLIENTS[:1], failed={CLIENTS[1]: "away"}, tries=2, seconds=4.0),
        Aggregation(number, {"step_gain": 0.5, "lost": math.nan}, seconds=0.25),
        Evaluation(number, "depot", 0.5, 1.0, seconds=2.0, metrics={"rouge": 0.25}),
        Evaluation(number, "clinic", 0.25, 3.0, seconds=1.0, metrics={"rouge": 0.75}),
        Validation(number, "depot", 0.5, 4.0),
    ]


def test_a_round_is_loss_scores_bytes_seconds_and_attendance():
    (point,) = rounds_of(round_of(1)).close(1)
    assert point.round == 1
    assert point.values == {
        "bytes/up": 30,
        "bytes/down": 200,
        "bytes/total_up": 30,
        "bytes/total_down": 200,
        "clients/answered": 1,
        "clients/missed": 1,
        "clients/refused": 1,
        "clients/diverged": 0,
        "clients/failed": 1,
        "clients/late": 0,
        "clients/tries": 2,
        "train/loss": 2.0,
        "seconds/train": 1.5,
        "seconds/gather": 4.0,
        "seconds/aggregate": 0.25,
        "seconds/evaluate": 3.0,
        "eval/exact_match": 0.375,
        "eval/exact_match/depot": 0.5,
        "eval/exact_match/clinic": 0.25,
        "eval/loss": 2.0,
        "eval/loss/depot": 1.0,
        "eval/loss/clinic": 3.0,
        "eval/rouge": 0.5,
        "eval/rouge/depot": 0.25,
        "eval/rouge/clinic": 0.75,
        "validation/loss": 4.0,
        "validation/exact_match": 0.5,
        "server/step_gain": 0.5,
    }, "what is not finite is left out"
    assert not any(client in name for client in CLIENTS for name in point.values)


def test_rounds_are_handed_out_once_and_in_order():
    found = rounds_of([*round_of(1), *round_of(2), *round_of(3)])
    assert [point.round for point in found.close(2)] == [1, 2]
    assert found.close(2) == []
    (last,) = found.close(3)
    assert (last.round, last.values["bytes/total_up"], last.values["bytes/total_down"]) == (3, 90, 600)


def test_what_comes_late_counts_in_the_next_round_alone():
    found = rounds_of(round_of(1))
    found.close(1)
    found.take(Transfer(1, CLIENTS[1], "down", "full", 1000, delivery=True))
    assert found.close(1) == []
    for row in round_of(2):
        found.take(row)
    (point,) = found.close(2)
    assert point.values["bytes/total_down"] == 200 + 1000 + 200


def test_before_the_first_round_there_are_scores_alone():
    (point,) = rounds_of([Evaluation(0, "depot", 0.0, 5.0)]).close(0)
    assert point.values == {"eval/exact_match": 0.0, "eval/loss": 5.0}


def test_bytes_between_regions_stand_by_themselves():
    (point,) = rounds_of([Relay(1, "north", "up", "sum", 7), Relay(1, "north", "down", "delta", 9)]).close(1)
    assert (point.values["bytes/regions_up"], point.values["bytes/regions_down"]) == (7, 9)
    assert point.values["bytes/up"] == 0
