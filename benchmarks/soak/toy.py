"""A model of three small modules and a training step that is a seeded random change: a turn takes milliseconds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from fedloom.compress.quantize import quantize
from fedloom.lora.pair import LoraPair, LoraState, initial_state
from fedloom.methods.method import State
from fedloom.methods.table import build
from fedloom.model.placement import Adapter, Placement
from fedloom.model.tokens import TokenizedExamples
from fedloom.records.config import Config, LoraSettings
from fedloom.rounds.job import Job
from fedloom.rounds.step import Train, Trained
from fedloom.workspace.assemble import Setup
from fedloom.workspace.clients import LocalClient
from fedloom.workspace.plan import caps_of

SHAPES = {"layers.0.k_proj": (6, 10), "layers.0.q_proj": (12, 10), "layers.1.down": (10, 17)}
RANK = 4
EXAMPLES = 8
"""Of every site; nobody looks at them."""
Trainings = Callable[[str, int], None]
"""(site, round): called before a training step."""


class ToySetup(Setup):
    """A setup that trains nothing and scores nothing. told: hears of every training step; None: nobody does."""

    told: Trainings | None = None

    def train(self, client: str, interrupt: Callable[[], None] | None = None) -> Train:
        """The made-up step of one site; `interrupt` is called before it, as before a forward pass."""

        def step(state: State, round: int, seed: int) -> Trained:
            if interrupt:
                interrupt()
            told = type(self).told
            if told:
                told(client, round)
            return _changed(state, self.job, round, seed)

        return step

    def evaluate(self, state: State) -> dict[str, object]:  # type: ignore[override]
        """No scores: there are no examples."""
        return {}


def assemble(config: Config) -> ToySetup:
    """The setup of a run for all its participants; it stands for `workspace.assemble.build_setup`."""
    placed = {name: Placement(shape, RANK, 32.0) for name, shape in SHAPES.items()}
    adapter = Adapter(LoraSettings(r=RANK), placed)
    names = sorted(config.federation.participants or ())
    examples = TokenizedExamples((None,) * EXAMPLES, 0)  # type: ignore[arg-type]  # nobody looks at them
    sites = {name: LocalClient(adapter, examples) for name in names}
    job = Job(build(config.method.name, config.method.settings), config.federation.seed, quantize("fp32"))
    ranks = {name: held.ranks for name, held in sites.items()}
    job = replace(job, caps=caps_of(config.federation, sites), ranks=ranks)
    initial = initial_state(SHAPES, dict.fromkeys(SHAPES, RANK), config.federation.seed)
    return ToySetup(config, job, None, adapter, initial, sites, None, "soak")  # type: ignore[arg-type]


def _changed(state: State, job: Job, round: int, seed: int) -> Trained:
    """A random change of the factors that the method trains in this round."""
    generator, parts = torch.Generator().manual_seed(seed), job.method.trainable(round)

    def moved(pair: LoraPair) -> LoraPair:
        noise = {part: 0.1 * torch.randn(pair.part(part).shape, generator=generator) for part in ("A", "B")}
        return LoraPair(*(pair.part(part) + noise[part] * (part in parts) for part in ("A", "B")))

    after = LoraState({module: moved(pair) for module, pair in state.adapter.items()})
    return Trained(after, num_examples=1 + seed % 7, loss=1.0, steps=1)
