"""What [training.dp] means for a client with so many examples, and what it costs."""

from __future__ import annotations

from dataclasses import replace

from fedloom.noise.accounting import SampledNoise, example_epsilon, find_noise
from fedloom.records.config import Config, TrainingSettings


def plan_noise(settings: TrainingSettings, examples: int, num_rounds: int) -> SampledNoise | None:
    """A round's noise for a client with so many examples; None without training.dp.

    Where an ε is given, the noise is such that all rounds together cost it, for a client that is in as many of them as
    it may be (`TrainingSettings.dp.rounds`).
    Raises ConfigError where there is no such noise, or where the library that finds it is not installed.
    """
    if settings.dp is None:
        return None
    steps = settings.for_examples(examples).steps
    rate = min(1.0, settings.batch / examples)
    noise = settings.dp.noise_multiplier
    if settings.dp.epsilon is not None:
        noise = find_noise(
            settings.dp.epsilon, settings.dp.delta_of(examples), rate, steps * settings.dp.turns_of(num_rounds)
        )
    assert noise is not None
    return SampledNoise(rate, noise, steps)


def client_epsilon(config: Config, client: str, examples: int, turns: int) -> tuple[float, float]:
    """(ε, δ) at example level of so many turns of a client with so many examples; for runs with training.dp."""
    training = config.training_of(client)
    noise = plan_noise(training, examples, config.federation.num_rounds)
    assert noise is not None and training.dp is not None
    delta = training.dp.delta_of(examples)
    return example_epsilon([replace(noise, steps=noise.steps * turns)], delta), delta
