"""One client's local training in one round by forward passes alone: no gradient, no optimiser, no activations kept.

The slope of the loss along a direction is measured by moving the adapter a little to both sides of it. What comes out
depends on the arguments alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fedloom.lora.curvature import scales_of
from fedloom.lora.directions import draw_direction, move_along
from fedloom.lora.pair import LoraState
from fedloom.methods.forward import ForwardOnly
from fedloom.model import peft_bridge
from fedloom.model.packing import collator, training_rows, without_mask
from fedloom.model.settled import keep_use_cache
from fedloom.model.tokens import IGNORED, TokenizedExamples
from fedloom.model.training import TrainStats, rate_at
from fedloom.records.config import TrainingSettings

if TYPE_CHECKING:
    import peft

Batch = list[dict[str, Tensor]]
"""The micro-batches of a step."""
Loss = Callable[[LoraState, Batch], float]
"""(adapter, batch) → mean loss of a completion token."""


@dataclass(frozen=True, eq=False, slots=True)
class Walk:
    """Where a training by forward passes has led: the adapter, how far it went along each direction (seeds,), and the
    mean of all losses that were measured.
    """

    adapter: LoraState
    moved: Tensor
    loss: float


def forward_update(
    model: peft.PeftModel,
    state: LoraState,
    frozen: LoraState,
    data: TokenizedExamples,
    settings: TrainingSettings,
    forward: ForwardOnly,
    *,
    curvature: LoraState,
    run_seed: int,
    round: int,
    num_rounds: int,
    seed: int,
    interrupt: Callable[[], None] | None = None,
) -> tuple[LoraState, Tensor, TrainStats]:
    """Train `state`, on top of W0 and `frozen`, for one round: the adapter, and how far it went along each direction.

    curvature: what the directions are scaled by. run_seed: what they are drawn from, the same for all clients. Of the
    settings count those of steps, batch, learning rate and bf16. `interrupt` is called before every forward pass; what
    it raises ends the training.
    """
    begun = time.perf_counter()
    settings = settings.for_examples(data.num_rows)  # an epoch draws every row once
    peft_bridge.set_frozen(model, frozen)
    base = cast(PreTrainedModel, model.get_base_model())
    rows = training_rows(data)
    collate = collator(model, rows)
    tokens = 0

    def loss(adapter: LoraState, batch: Batch) -> float:
        peft_bridge.write_adapter(model, adapter)
        return mean_loss(model, batch, bf16=settings.bf16, interrupt=interrupt)

    def batches() -> Iterator[Batch]:
        nonlocal tokens
        for drawn in draw_batches(data.num_rows, settings, seed):
            batch = [collate([rows[place] for place in places]) for places in drawn]
            tokens += sum(int(inputs["attention_mask"].sum()) for inputs in batch)
            yield batch

    model.eval()
    with keep_use_cache(base.config), torch.no_grad():
        walk = walk_along(
            state,
            loss,
            batches(),
            forward,
            scales=scales_of(curvature),
            rate=lambda step: rate_at(settings, round, num_rounds, step),
            seed_of=lambda number: forward.seed(run_seed, round, number),
            seed=seed,
        )
    stats = TrainStats(walk.loss, settings.steps, len(data), tokens, time.perf_counter() - begun)
    return walk.adapter, walk.moved, stats


def walk_along(
    adapter: LoraState,
    loss: Loss,
    batches: Iterator[Batch],
    forward: ForwardOnly,
    *,
    scales: Mapping[str, Tensor],
    rate: Callable[[int], float],
    seed_of: Callable[[int], int],
    seed: int,
) -> Walk:
    """A step for each batch: θ ← θ − η Σ_j g_j z_j / P, with the slopes g_j of `loss` along P directions.

    scales: see `draw_direction`. rate: step → η. seed_of: number of a direction → its seed. seed: what a client's own
    choice of them follows from.
    """
    moved, losses = torch.zeros(forward.seeds), 0.0
    measured, epsilon = 0, forward.epsilon
    for step, batch in enumerate(batches):
        after = adapter
        for number in forward.numbers(step, seed):
            direction = draw_direction(adapter, seed_of(number), scales)
            above = loss(move_along(adapter, direction, epsilon), batch)
            below = loss(move_along(adapter, direction, -epsilon), batch)
            length = -rate(step) * (above - below) / (2 * epsilon * forward.perturbations)
            moved[number] += length
            after = move_along(after, direction, length)
            losses += above + below
            measured += 2
        adapter = after
    return Walk(adapter, moved, losses / max(measured, 1))


def draw_batches(number: int, settings: TrainingSettings, seed: int) -> Iterator[list[list[int]]]:
    """The rows of the micro-batches of a round's steps, out of so many: every row once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size, waiting = settings.per_device_train_batch_size, list[int]()
    for _ in range(settings.steps):
        batch: list[list[int]] = []
        for _ in range(settings.gradient_accumulation_steps):
            if not waiting:
                waiting = torch.randperm(number, generator=generator).tolist()
            batch.append(waiting[:size])
            waiting = waiting[size:]
        yield batch


def mean_loss(
    model: peft.PeftModel, batch: Batch, *, bf16: bool = False, interrupt: Callable[[], None] | None = None
) -> float:
    """The mean loss of a completion token over the micro-batches, in nats."""
    total, counted = 0.0, 0
    for inputs in batch:
        if interrupt is not None:
            interrupt()
        placed = {name: tensor.to(model.device) for name, tensor in inputs.items()}
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            loss = model(**without_mask(placed)).loss
        tokens = int((inputs["labels"][:, 1:] != IGNORED).sum())
        total, counted = total + float(loss) * tokens, counted + tokens
    return total / max(counted, 1)
