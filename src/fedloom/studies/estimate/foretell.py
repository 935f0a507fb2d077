"""A run's own prediction: written into its folder when it begins, or whenever it is asked for."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from fedloom.errors import ConfigError, FedloomError
from fedloom.methods.method import Method
from fedloom.records.events import Observer, RunFacts, RunSummary, Scores
from fedloom.report.prediction import RunPrediction, write_prediction
from fedloom.studies.estimate import build_variants, play_case, predict_case
from fedloom.studies.estimate.case import Case, run_case
from fedloom.studies.estimate.rounds import ROUNDS, Prediction, sample_modules

MOST_WORK = 1_000_000
"""Adapter values, of all clients and rounds that are played, up to which a run writes its prediction as it begins:
about a second of processor time. Beyond, `fedloom estimate RUN` writes it when it is asked for."""
MOST_CLIENTS = 200
"""The same for clients, whose turns are drawn for every round."""


def foretell_run(folder: Path) -> RunPrediction:
    """Predict the bytes of a run that has begun, from its ledger and its model's shapes, and keep that in its folder.

    Raises ConfigError where the folder holds no run, or its method cannot be played.
    """
    return _foretell(folder, run_case(folder))


def foretell_quickly(folder: Path) -> None:
    """The same of a run in progress, where that takes about a second; else nothing is written."""
    with torch.random.fork_rng(devices=[]):  # a run's own draws are its own
        case = run_case(folder)
        if count_work(case) <= MOST_WORK:
            _foretell(folder, case)


def _foretell(folder: Path, case: Case) -> RunPrediction:
    told = predict_run(case)
    write_prediction(folder, told)
    return told


def count_work(case: Case) -> int:
    """Adapter values that are played: of the sample, of every client of a round, in every round."""
    shapes = sample_modules(case.layout, case.ranks).shapes
    most = max(sum(rank * sum(shapes[m]) for m, rank in held.items() if m in shapes) for held in case.ranks.values())
    return ROUNDS * case.combined * most


def predict_run(case: Case) -> RunPrediction:
    """The bytes of a case's run, in the method's own coding. Raises the ConfigError of a method that refuses it.

    It is the mean of two kinds of made-up training, one whose changes lie anywhere and one whose changes lie in the
    first components (`made_up.train_made_up`): what training really does is between them.
    """
    ((name, method),) = build_variants(case, [case.method]).items()
    anywhere, leading = (_predict_one(case, name, method, fading=fading) for fading in (False, True))
    ones, others = play_case(anywhere, case), play_case(leading, case)
    rounds = [
        [[sum(client[way] for client in clients.values()) for way in (0, 1)] for clients in course.rounds]
        for course in (ones, others)
    ]
    up, down = (tuple(_mean(one[way], other[way]) for one, other in zip(*rounds, strict=True)) for way in (0, 1))
    return RunPrediction(
        method=method.name,
        up=up,
        down=down,
        delivery=_mean(ones.delivered, others.delivered),
        relayed=_mean(ones.relayed, others.relayed),
        server_cpu_s=anywhere.server_cpu_s,
        # Where everybody drops out nothing is sent.
        spread=2 * abs(ones.bytes - others.bytes) / max(ones.bytes + others.bytes, 1),
    )


def _mean(one: float, other: float) -> int:
    return round((one + other) / 2)


def _predict_one(case: Case, name: str, method: Method, *, fading: bool) -> Prediction:
    (told,) = predict_case(case, {name: method}, with_memory=False, codings=(), fading=fading).values()
    if isinstance(told, ConfigError):
        raise told
    return told


@dataclass
class Foretelling:
    """An observer that has the run foretold as it begins, and hands every call on."""

    view: Observer

    def run_started(self, facts: RunFacts) -> None:
        """The ledger has its first rows by now."""
        if len(facts.clients) <= MOST_CLIENTS:
            with suppress(FedloomError, OSError):  # no run shall fail for what is only told about it
                foretell_quickly(facts.out)
        self.view.run_started(facts)

    def client_started(self, round: int, client: str) -> None:
        """Handed on."""
        self.view.client_started(round, client)

    def client_finished(self, round: int, client: str, loss: float, bytes_up: int, bytes_down: int) -> None:
        """Handed on."""
        self.view.client_finished(round, client, loss, bytes_up, bytes_down)

    def noted(self, round: int, text: str) -> None:
        """Handed on."""
        self.view.noted(round, text)

    def round_finished(
        self, round: int, num_rounds: int, scores: Scores | None, bytes_up: int, bytes_down: int, seconds: float
    ) -> None:
        """Handed on."""
        self.view.round_finished(round, num_rounds, scores, bytes_up, bytes_down, seconds)

    def run_finished(self, summary: RunSummary) -> None:
        """Handed on."""
        self.view.run_finished(summary)
