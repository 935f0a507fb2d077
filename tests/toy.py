"""A federation small enough to play hundreds of rounds in a second: three non-square modules and a made-up step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from fedloom.adapters.settings import AdapterSettings
from fedloom.compress.budget import Budget
from fedloom.compress.quantize import quantize
from fedloom.compress.seeds import derived_seed
from fedloom.lora.curvature import scales_of
from fedloom.lora.directions import move_along_all
from fedloom.lora.pair import LoraPair, LoraState, initial_state, subset
from fedloom.methods.method import Method, State
from fedloom.methods.table import METHODS, build, method_options
from fedloom.records.quantities import parse_budget
from fedloom.rounds import federation
from fedloom.rounds.federation import RoundResult
from fedloom.rounds.step import Train, Trained
from fedloom.rounds.turns import Job, ServerTurn, accept
from fedloom.workspace.checkpoint import Snapshot, load_checkpoint, save_checkpoint

SHAPES = {"layers.0.k_proj": (6, 10), "layers.0.q_proj": (12, 10), "layers.1.down": (10, 17)}
RANK = 4
CLIENTS_OF_SCALARS = [name for name in METHODS if build(name).forward]
"""Methods that a training by gradients does not go with."""


def job(
    method: Method,
    *,
    seed: int = 3,
    weighting: str = "examples",
    values: str = "fp32",
    budget: str | int | None = None,
    module_weighting: str = "holders",
) -> Job:
    kept = None if budget is None else Budget(*parse_budget(str(budget)))
    return Job(method, seed, quantize(values), weighting, kept, module_weighting)


def built(name: str) -> Method:
    """The method with its defaults, without a base model to take anything from."""
    return build(name, {"factors": "random"} if "factors" in method_options(name) else None)


def on_base(method: Method, adapter: LoraState) -> Method:
    """The method on a base model that nobody has, where it takes something from its weights."""

    def read(module: str) -> torch.Tensor:
        generator = torch.Generator().manual_seed(derived_seed(0, module))
        return torch.randn(adapter[module].shape, generator=generator)

    return method if method.on_base is None else method.on_base(method, adapter, read)


def ranks(rank: int | dict[str, int]) -> dict[str, int]:
    """One rank for every module, or each module's own; a client does not train a module that is left out."""
    return dict.fromkeys(SHAPES, rank) if isinstance(rank, int) else rank


def initial(rank: int | dict[str, int] = RANK, seed: int = 3) -> LoraState:
    return initial_state(SHAPES, ranks(rank), seed)


def random_state(seed: int, rank: int = RANK, size: float = 0.1) -> LoraState:
    generator = torch.Generator().manual_seed(seed)
    return LoraState(
        {
            module: LoraPair(
                size * torch.randn(rank, n, generator=generator), size * torch.randn(m, rank, generator=generator)
            )
            for module, (m, n) in SHAPES.items()
        }
    )


def step(
    state: State,
    round: int,
    seed: int,
    *,
    size: float = 0.1,
    parts: tuple[str, ...] = ("A", "B"),
    core: LoraState | None = None,
) -> Trained:
    """A seeded random change of the trainable factors, or of the matrix within a core; so are the examples."""
    generator = torch.Generator().manual_seed(seed)

    def moved(module: str, pair: LoraPair) -> LoraPair:
        if core:
            change = size * torch.randn(pair.rank, core[module].rank, generator=generator)
            return LoraPair(pair.A + change @ core[module].A, pair.B)
        noise = {part: size * torch.randn(pair.part(part).shape, generator=generator) for part in ("A", "B")}
        return LoraPair(*(pair.part(part) + noise[part] * (part in parts) for part in ("A", "B")))

    after = LoraState({module: moved(module, pair) for module, pair in state.adapter.items()})
    return Trained(after, num_examples=1 + seed % 7, loss=1.0, steps=1)


def step_along(method: Method, run_seed: int, *, size: float = 0.1) -> Train:
    """The toy step of a method that trains by forward passes: seeded random lengths along what five steps try."""
    forward = method.forward
    assert forward is not None

    def train(state: State, round: int, seed: int) -> Trained:
        generator = torch.Generator().manual_seed(seed)
        moved = torch.zeros(forward.seeds)
        places = [number for step in range(5) for number in forward.numbers(step, seed)]
        moved[places] = size * torch.randn(len(places), generator=generator)
        steps = {forward.seed(run_seed, round, number): float(moved[number]) for number in sorted(places)}
        after = move_along_all(state.adapter, steps, scales_of(state.curvature))
        return Trained(after, num_examples=1 + seed % 7, loss=1.0, steps=1, moved=moved)

    return train


def trainer(method: Method, *, size: float = 0.1, run_seed: int = 3) -> Train:
    """The toy step, moving only what the method trains in that round. run_seed: of the run, as in `job`."""
    if method.forward:
        return step_along(method, run_seed, size=size)
    return lambda state, round, seed: step(
        state, round, seed, size=size, parts=method.trainable(round), core=method.core(state)
    )


class Federation(federation.Federation):
    """A federation of toy clients, who may sit rounds out: each is brought in step before its next turn."""

    def __init__(
        self,
        job: Job,
        clients: dict[str, int | dict[str, int]] | None = None,
        *,
        train=None,
        shapes: dict[str, tuple[int, int]] = SHAPES,
        settings: dict[str, AdapterSettings] | None = None,
    ) -> None:
        own = {name: ranks(rank) for name, rank in (clients or dict.fromkeys(["ada", "bob", "cyd"], RANK)).items()}
        top = {module: max(held.get(module, 0) for held in own.values()) for module in shapes}
        begin = initial_state(shapes, top, 3)
        super().__init__(replace(job, method=on_base(job.method, begin)), begin, own)
        self.settings = settings or {}
        self.train = train or trainer(self.job.method, run_seed=self.job.seed)
        self.broadcasts: list[bytes] = []
        self.uploads: Mapping[str, bytes] = {}

    def play(self, attending: list[str] | None = None) -> RoundResult:
        """One round with the named clients (all of them by default), each first brought in step."""
        attending = attending or list(self.clients)
        for name in attending:
            self.bring(name)
        result = self.round({name: self.training(name) for name in attending})
        assert not result.refused
        self.uploads = result.uploads
        return result

    def deliver(self, turn: ServerTurn) -> None:
        """Nobody receives the broadcast before its next turn."""
        self.broadcasts.append(turn.payload)

    def training(self, name: str) -> Train:
        """The client's step, on the modules that it has, in PEFT's terms: its B is the inner one without its scale."""
        settings = self.settings.get(name)

        def scaled(adapter: LoraState, power: int) -> LoraState:
            if settings is None:
                return adapter
            return LoraState(
                {m: LoraPair(pair.A, pair.B * settings.scale(m, pair.rank) ** power) for m, pair in adapter.items()}
            )

        def train(state: State, round: int, seed: int) -> Trained:
            inner = replace(state, adapter=scaled(subset(state.adapter, self.ranks[name]), -1))
            trained = self.train(inner, round, seed)
            return replace(trained, adapter=scaled(trained.adapter, 1))

        return train

    def missed(self, name: str) -> list[bytes]:
        return [self.broadcast_for(name, payload) for payload in self.broadcasts[self.clients[name].version :]]

    def bring(self, name: str) -> None:
        """Give a client what it has missed."""
        for payload in self.missed(name):
            self.clients[name] = accept(self.job, self.clients[name], payload)

    def settle(self) -> None:
        """Give every client what it has missed."""
        for name in self.clients:
            self.bring(name)


def delta(state: LoraState) -> dict[str, torch.Tensor]:
    """Dense ΔW in float64, module by module."""
    return {module: pair.B.double() @ pair.A.double() for module, pair in state.items()}


def client_seed(job: Job, client: str, round: int) -> int:
    """The seed that the client's training step gets."""
    return derived_seed(job.seed, "train", client, round)


def take_up(resumed: Federation, federation: Federation, folder: Path) -> None:
    """Have `resumed` go on where the other one stands, by way of a checkpoint on disk."""
    archive = dict(enumerate(federation.broadcasts))
    snapshot = Snapshot(federation.number, federation.server, federation.clients, archive)
    loaded = load_checkpoint(save_checkpoint(folder, snapshot))
    resumed.server, resumed.clients = loaded.server, dict(loaded.clients)
    resumed.broadcasts, resumed.number = list(loaded.archive.values()), loaded.round
