"""The measurement of asynchronous rounds: whose clock counts, and when a run has reached a score."""

from __future__ import annotations

from benchmarks.buffered import MEASURES, compare_times, read_clock, read_scores, tables

from fedloom.records.ledger import Aggregation, Evaluation


def course(times: list[float | None], scores: list[float]) -> tuple[list, dict]:
    rows: list = [Evaluation(0, "bank", 0.0, 9.0)]
    for round, (time, score) in enumerate(zip(times, scores, strict=True), start=1):
        rows.append(Aggregation(round, {} if time is None else {"simulated_time": time}))
        rows += [
            Evaluation(round, domain, score + more, 1.0 - score) for domain, more in (("bank", 0.1), ("lab", -0.1))
        ]
    clock = read_clock(rows, 10.0)
    held = {measure: read_scores(rows, clock, measure) for measure in MEASURES}
    return rows, {"steps": len(times), "turns": 2, "time": max(clock.values()), "scores": held}


def test_a_synchronous_round_lasts_as_long_as_its_slowest_site():
    assert read_clock(course([None] * 3, [0.1, 0.2, 0.3])[0], 10.0) == {0: 0.0, 1: 10.0, 2: 20.0, 3: 30.0}
    assert read_clock(course([0.5, 0.5, 2.0], [0.1, 0.2, 0.3])[0], 10.0) == {0: 0.0, 1: 0.5, 2: 0.5, 3: 2.0}


def test_time_is_that_of_the_first_evaluation_as_good_as_the_last_synchronous_one():
    synchronous, buffered = course([None] * 3, [0.5, 0.3, 0.4])[1], course([2.0, 3.0, 9.0], [0.1, 0.4, 0.2])[1]
    runs = {"synchronous": synchronous, "buffered": buffered}
    found = compare_times(runs, "exact match")
    assert (found["synchronous"], found["buffered"], found["ratio"]) == (10.0, 3.0, 0.3)
    never = compare_times({**runs, "buffered": course([2.0], [0.1])[1]}, "loss")
    assert never["buffered"] is None and never["ratio"] is None
    shown = tables({"slowest": 10.0, "runs": runs, "reached": {"exact match": found, "loss": never}})
    assert [table.row_count for table in shown] == [2, 2]
    assert "never" in list(shown[1].columns[3].cells)
