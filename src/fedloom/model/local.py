"""A client's training in a round as a run asks for it: by gradients, or by forward passes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import State
from fedloom.model.forward import forward_update
from fedloom.model.private import PrivateRound
from fedloom.model.tokens import TokenizedExamples
from fedloom.model.training import local_update
from fedloom.records.config import TrainingSettings
from fedloom.rounds.job import Job
from fedloom.rounds.step import Trained

if TYPE_CHECKING:
    import peft


def train_locally(
    model: peft.PeftModel,
    job: Job,
    state: State,
    parts: tuple[LoraState, LoraState],
    data: TokenizedExamples,
    settings: TrainingSettings,
    *,
    round: int,
    seed: int,
    interrupt: Callable[[], None] | None = None,
    private: PrivateRound | None = None,
) -> Trained:
    """Train a client's own part of its state. parts: that part, and all that stays as it is beside W0.

    interrupt, private: see `local_update`.
    """
    trained, fixed = parts
    method = job.method
    if method.forward:
        if private is not None:
            raise ConfigError(f"noise on examples is noise on gradients, and method {method.name!r} takes none")
        after, moved, stats = forward_update(
            model,
            trained,
            fixed,
            data,
            settings,
            method.forward,
            curvature=state.curvature,
            run_seed=job.seed,
            round=round,
            num_rounds=job.num_rounds,
            seed=seed,
            interrupt=interrupt,
        )
        return Trained(after, stats.examples, stats.loss, stats.steps, stats.seconds, moved=moved)
    after, stats = local_update(
        model,
        trained,
        fixed,
        data,
        settings,
        round=round,
        num_rounds=job.num_rounds,
        seed=seed,
        trainable=method.trainable(round),
        core=method.core(state),
        penalty=method.penalty,
        interrupt=interrupt,
        private=private,
    )
    return Trained(after, stats.examples, stats.loss, stats.steps, stats.seconds)
