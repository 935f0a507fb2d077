"""What an attacker finds out of training with noise on examples, beside the ε that is stated: an audit in one run.

Canaries are examples of random tokens. A coin says for each whether it is trained on; one that is not stands there
without anything to learn, so that the number of examples is the same. Whoever sees the adapter guesses the coins, of
those canaries that he is surest of: what has become more likely was there. How many guesses are right bounds ε from
below (Steinke, Nasr & Jagielski, "Privacy auditing with one (1) training run", arXiv 2305.08846, theorem 5.2).
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from fedloom.lora.pair import LoraState, initial_state
from fedloom.model import peft_bridge
from fedloom.model.base import load_base
from fedloom.model.example_gradients import mean_losses
from fedloom.model.placement import place_adapter
from fedloom.model.private import PrivateRound
from fedloom.model.tokens import TokenizedExamples, Tokens
from fedloom.model.training import local_update
from fedloom.noise.accounting import example_epsilon
from fedloom.noise.secret import derive_key
from fedloom.records.config import LoraSettings, TrainingSettings
from fedloom.records.noise import plan_noise
from fedloom.records.sections.dp import DpSettings
from fedloom.testbeds import testbed_folder

if TYPE_CHECKING:
    import peft

LENGTH = 8
"""Tokens of a canary."""
RANK, RATE = 8, 2e-3
"""Of the adapter, and of its training: with them canaries are learnt by heart where no noise is in the way."""
NO_NOISE = 1e-3
"""Noise multiplier of the training that shows that the audit would find something."""
CONFIDENCE = 0.95


def run(
    epsilon: float = 8.0, canaries: int = 100, guesses: int = 60, steps: int = 120, seed: int = 0
) -> dict[str, Any]:
    """{"rows": [with the noise of an ε, and without noise]}: guesses that were right, the bound, and the ε stated."""
    model, state = _resident(seed)
    rows = []
    for target in (epsilon, math.inf):
        rows.append(audit(model, state, target, canaries, guesses, steps, seed))
    return {"rows": rows}


def audit(
    model: peft.PeftModel, state: LoraState, epsilon: float, canaries: int, guesses: int, steps: int, seed: int
) -> dict[str, Any]:
    """One training with canaries, and what an attacker makes of it. epsilon: inf for hardly any noise."""
    draw = random.Random(seed)
    words = range(4, int(model.config.get_text_config().vocab_size))
    made = [Tokens(torch.tensor([draw.choice(words) for _ in range(LENGTH)]), 1, True) for _ in range(canaries)]
    there = [draw.random() < 0.5 for _ in made]
    held = [one if kept else replace(one, learnt=()) for one, kept in zip(made, there, strict=True)]
    data = TokenizedExamples(tuple(held), 0)
    dp = DpSettings(epsilon=epsilon) if math.isfinite(epsilon) else DpSettings(noise_multiplier=NO_NOISE)
    settings = TrainingSettings(learning_rate=RATE, max_steps=steps, per_device_train_batch_size=canaries // 2, dp=dp)
    noise = plan_noise(settings, canaries, 1)
    assert noise is not None
    private = PrivateRound(noise, dp.clip_norm, derive_key(b"an audit", seed, epsilon))
    before = _losses(model, state, made)
    after, _ = local_update(
        model, state, LoraState(), data, settings, round=1, num_rounds=1, seed=seed, private=private
    )
    fallen = before - _losses(model, after, made)
    right = count_right(fallen.tolist(), there, guesses)
    delta = 1.0 / canaries
    return {
        "epsilon": example_epsilon([noise], delta) if math.isfinite(epsilon) else None,
        "delta": delta,
        "noise_multiplier": noise.noise_multiplier,
        "guesses": guesses,
        "right": right,
        "lower_bound": lower_bound(right, guesses, canaries, delta if math.isfinite(epsilon) else 0.0),
    }


def count_right(scores: Sequence[float], there: Sequence[bool], guesses: int) -> int:
    """How many guesses are right: half of them that the canaries of the highest scores were there, half that those of
    the lowest were not.
    """
    order, half = sorted(range(len(scores)), key=lambda place: scores[place]), guesses // 2
    lowest, highest = order[:half], order[len(order) - (guesses - half) :]
    return sum(there[place] for place in highest) + sum(not there[place] for place in lowest)


def lower_bound(right: int, guesses: int, canaries: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest ε that so many right guesses rule out with this confidence; 0 where they rule out none."""
    low, high = 0.0, 1.0
    while chance(right, guesses, canaries, high, delta) < 1 - confidence and high < 64:
        low, high = high, 2 * high
    for _ in range(40):
        middle = 0.5 * (low + high)
        low, high = (
            (low, middle) if chance(right, guesses, canaries, middle, delta) > 1 - confidence else (middle, high)
        )
    return low


def chance(right: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """With which chance at most so many guesses, or more, are right of who trains (ε, δ)-privately; 1 at most.

    Without δ each guess is right with probability e^ε / (1 + e^ε) at most. What δ adds is bounded by how far fewer
    right guesses are from being enough.
    """
    from scipy.stats import binom  # type: ignore[import-untyped]

    each = 1.0 / (1.0 + math.exp(-epsilon))
    enough = float(binom.sf(right - 1, guesses, each))
    short, most = 0.0, 0.0
    for missing in range(1, right + 1):
        short += float(binom.pmf(right - missing, guesses, each))
        most = max(most, short / missing)
    return min(1.0, enough + 2.0 * canaries * delta * most)


def _resident(seed: int) -> tuple[peft.PeftModel, LoraState]:
    """The demo's base model with an adapter on its attention."""
    base, _ = load_base(str(testbed_folder() / "model"), device="cpu")
    lora = LoraSettings(r=RANK, lora_alpha=2.0 * RANK, target_modules="all-linear")
    adapter = place_adapter(peft_bridge.linear_modules(base), lora)
    return peft_bridge.attach(base, adapter), initial_state(adapter.shapes, adapter.ranks, seed)


def _losses(model: peft.PeftModel, state: LoraState, made: Sequence[Tokens]) -> torch.Tensor:
    peft_bridge.write_adapter(model, state)
    with torch.no_grad():
        return mean_losses(model, TokenizedExamples(tuple(made), 0).collate(made))


def tables(result: Mapping[str, Any]) -> list[Table]:
    """The rows as a table."""
    table = Table(title="canaries: ε as stated, and as bounded from below by an audit")
    for name in ("ε stated", "δ", "noise multiplier", "guesses", "right", "ε at least"):
        table.add_column(name, justify="right")
    for row in result["rows"]:
        stated = "–" if row["epsilon"] is None else f"{row['epsilon']:.3g}"
        numbers = (f"{row['delta']:.2g}", f"{row['noise_multiplier']:.3g}", str(row["guesses"]), str(row["right"]))
        table.add_row(stated, *numbers, f"{row['lower_bound']:.3g}")
    return [table]
