"""DP-SGD on a client's factors: a step's outcome hardly depends on any single example.

Every step draws each example with the same chance, adds up their clipped gradients and noise, and divides by the number
of examples that it draws on average, which does not depend on who was drawn (Abadi et al., arXiv 1607.00133). All that
a client sends is made from the outcome. What is random about it comes from a key that the server does not know.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedloom.errors import ConfigError
from fedloom.model import peft_bridge
from fedloom.model.example_gradients import Batch, Gradients, choose_way, clipped_sums
from fedloom.model.tokens import TokenizedExamples
from fedloom.noise.accounting import SampledNoise
from fedloom.noise.stream import SecretStream

if TYPE_CHECKING:
    import peft


@dataclass(frozen=True, slots=True)
class PrivateRound:
    """A round's training under noise: how much of it, the norm that gradients are clipped to, where it comes from."""

    noise: SampledNoise
    clip_norm: float
    key: bytes = field(repr=False)

    @property
    def draw(self) -> str:
        """Names the draw of noise without telling its key: the same name stands for the same numbers."""
        return hashlib.sha256(b"draw of noise\0" + self.key).hexdigest()


def fit_privately(
    model: peft.PeftModel,
    data: TokenizedExamples,
    optimizer: torch.optim.Optimizer,
    private: PrivateRound,
    rates: Callable[[int], float],
    *,
    size: int,
    bf16: bool = False,
    penalty: Callable[[], Tensor] | None = None,
    interrupt: Callable[[], None] | None = None,
) -> int:
    """Train in place; returns the tokens that were seen. size: examples that go through the model together."""
    _check_ranks(model)
    stream, noise, tokens = SecretStream(private.key), private.noise, 0
    way = choose_way(model, data.pad)
    expected = noise.sampling_rate * len(data)
    for step in range(noise.steps):
        drawn = np.flatnonzero(stream.uniform(len(data)) < noise.sampling_rate).tolist()
        sums = Gradients()
        for begin in range(0, len(drawn), size):
            if interrupt is not None:
                interrupt()
            inputs = _batch(model, data, drawn[begin : begin + size])
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                gradients = way(model, inputs)
            for parameter, part in clipped_sums(gradients, private.clip_norm).items():
                sums[parameter] = sums[parameter] + part if parameter in sums else part
            tokens += int(inputs["attention_mask"].sum())
        _set_gradients(optimizer, sums, noise.noise_multiplier * private.clip_norm, expected, stream)
        if penalty is not None:
            penalty().backward()  # type: ignore[no-untyped-call]  # adds its gradient; it rests on no example
        for group in optimizer.param_groups:
            group["lr"] = rates(step)
        optimizer.step()
    optimizer.zero_grad()
    return tokens


def _check_ranks(model: peft.PeftModel) -> None:
    """Raises ConfigError where PEFT fills factors up with zeros, which noise would make part of the model."""
    for held in peft_bridge.lora_layers(model):
        if held.parameter and len(set(held.ranks(peft_bridge.TRAINED))) > 1:
            raise ConfigError(
                f"training.dp needs equal ranks in all matrices of {held.parameter}: leave rank_pattern out there"
            )


def _batch(model: peft.PeftModel, data: TokenizedExamples, drawn: Sequence[int]) -> Batch:
    return {name: held.to(model.device) for name, held in data.collate([data[index] for index in drawn]).items()}


def _set_gradients(
    optimizer: torch.optim.Optimizer, sums: Gradients, deviation: float, expected: float, stream: SecretStream
) -> None:
    """Give every parameter the mean gradient with its noise, drawn whoever was: a step without examples is noise."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            noise = torch.from_numpy(stream.normal(parameter.numel())).view(parameter.shape).to(parameter.device)
            summed = deviation * noise
            if parameter in sums:
                summed += sums[parameter]
            parameter.grad = (summed / expected).to(parameter.dtype)
