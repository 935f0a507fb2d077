"""Noise on the examples of a run's clients: how much, from which key, and what is said of it before a run begins."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from fedloom.errors import ConfigError
from fedloom.methods.method import Method
from fedloom.model.private import PrivateRound
from fedloom.noise.accounting import SampledNoise
from fedloom.noise.secret import derive_key, keep_secret
from fedloom.noise.stream import SecretStream
from fedloom.records.config import Config, TrainingSettings
from fedloom.records.noise import plan_noise
from fedloom.rounds.secure import Noise
from fedloom.rounds.sums import Secure
from fedloom.secagg.noise import draw_share

FILE = "noise.key"
"""In the folder of a simulated run, until it is over. Whoever has it can take the noise off again."""
_WEAK = 0.01
"""A larger δ, which is the chance that ε says nothing of an example, is worth a word."""


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
    turns = config.turns_of_client
    which = "all rounds" if turns == config.federation.num_rounds else f"{turns} round{'s' * (turns > 1)} of a client"
    goal = f"ε = {epsilon:g} at example level for {which}" if epsilon else "as much as noise_multiplier says"
    deltas = sorted(config.training.dp.delta_of(count) for count in examples.values())
    said = f"noise on examples, {goal}: noise multiplier {_span(found, '.3g')}, a step draws {_span(rates, '.2%')}"
    said += f", δ = {_span(deltas, '.2g')}"
    if deltas[-1] > _WEAK:
        said += "; a δ as large as that promises little: where clients have few examples, set training.dp.delta"
    if rates[-1] == 1.0:
        said += "; a step draws all examples of some client: with a smaller batch there would be less noise to add"
    return said


def _span(values: list[float], form: str) -> str:
    low, high = format(values[0], form), format(values[-1], form)
    return low if low == high else f"{low} to {high}"


def refuse_own_trainer(config: Config, method: Method) -> None:
    """Raises ConfigError where a trainer of one's own cannot do what the settings or the method ask of training."""
    if method.forward:
        raise ConfigError(
            f"method {method.name!r} trains by forward passes along directions of its own, and a trainer of one's own "
            "takes gradients: use another method, or let fedloom train"
        )
    if config.training.dp is not None:
        raise ConfigError(
            "training.dp cannot reach into a trainer of one's own, which clips no example's gradient: take it out, or "
            "let fedloom train"
        )


def noise_for_sum(secure: Secure | None, secret: bytes, *about: object) -> Noise | None:
    """A site's share of the noise in a sum; None without it. about: all that the site's vector depends on."""
    if secure is None or secure.noise is None:
        return None
    share, key = secure.noise.share, derive_key(secret or secrets.token_bytes(32), "sum", *about)
    return lambda steps: steps + draw_share(len(steps), share, SecretStream(key))


def needs_secret(config: Config) -> bool:
    """Whether a run draws noise at its sites."""
    return config.training.dp is not None or config.privacy.noise_multiplier is not None


def run_secret(folder: Path, config: Config) -> bytes:
    """What the noise of a simulated run comes from, the same when the run goes on; empty where there is no noise."""
    return keep_secret(folder / FILE) if needs_secret(config) else b""


def forget_secret(folder: Path) -> None:
    """A run that is over draws no noise any more, and its folder may be handed on."""
    (folder / FILE).unlink(missing_ok=True)
