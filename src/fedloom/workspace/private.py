"""Noise on the examples of a run's clients: how much, from which key, and what is said of it before a run begins."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.model.private import PrivateRound
from fedloom.noise.accounting import SampledNoise
from fedloom.noise.secret import derive_key, keep_secret
from fedloom.records.config import Config, TrainingSettings
from fedloom.records.noise import plan_noise

FILE = "noise.key"
"""In the folder of a simulated run, until it is over. Whoever has it can take the noise off again."""


def plan_round(
    training: TrainingSettings, noise: SampledNoise | None, secret: bytes, about: tuple[object, ...]
) -> PrivateRound | None:
    """The noise of one round; None without training.dp. about: all that the round's training depends on."""
    if noise is None or training.dp is None:
        return None
    key = derive_key(secret or secrets.token_bytes(32), metadata.version("fedloom"), noise, *about)
    return PrivateRound(noise, training.dp.clip_norm, key)


def describe_noise(config: Config, examples: Mapping[str, int]) -> str:
    """What training.dp comes to for clients with so many examples; "" without it.

    examples: client → how many, of those that train here. Raises ConfigError where no noise is enough.
    """
    if config.training.dp is None or not examples:
        return ""
    planned = {
        name: plan_noise(config.training_of(name), count, config.federation.num_rounds)
        for name, count in examples.items()
    }
    found = sorted(noise.noise_multiplier for noise in planned.values() if noise)
    rates = sorted(noise.sampling_rate for noise in planned.values() if noise)
    epsilon = config.training.dp.epsilon
    goal = f"ε = {epsilon:g} at example level for all rounds" if epsilon else "as much as noise_multiplier says"
    said = f"noise on examples, {goal}: noise multiplier {_span(found, '.3g')}, a step draws {_span(rates, '.2%')}"
    if rates[-1] == 1.0:
        said += "; a step draws all examples of some client: with a smaller batch there would be less noise to add"
    return said


def _span(values: list[float], form: str) -> str:
    low, high = format(values[0], form), format(values[-1], form)
    return low if low == high else f"{low} to {high}"


def refuse_own_trainer(config: Config) -> None:
    """Raises ConfigError where a trainer of one's own would be taken to protect examples."""
    if config.training.dp is not None:
        raise ConfigError(
            "training.dp cannot reach into a trainer of one's own, which clips no example's gradient: take it out, or "
            "let fedloom train"
        )


def run_secret(folder: Path, config: Config) -> bytes:
    """What the noise of a simulated run comes from, the same when the run goes on; empty where there is no noise."""
    return b"" if config.training.dp is None else keep_secret(folder / FILE)


def forget_secret(folder: Path) -> None:
    """A run that is over draws no noise any more, and its folder may be handed on."""
    (folder / FILE).unlink(missing_ok=True)
