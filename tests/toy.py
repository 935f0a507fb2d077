"""A federation small enough to play hundreds of rounds in a second: three non-square modules and a made-up step."""

from __future__ import annotations

import torch

from fedloom.lora import LoraPair, LoraState, derived_seed, initial_state
from fedloom.method import Method, State
from fedloom.rounds import Job, Trained, accept, addressed, client_turn, server_turn, start
from fedloom.wire import quantize

SHAPES = {"layers.0.k_proj": (6, 10), "layers.0.q_proj": (12, 10), "layers.1.down": (10, 17)}
RANK = 4


def job(
    method: Method, *, seed: int = 3, weighting: str = "examples", values: str = "fp32", budget: int | None = None
) -> Job:
    return Job(method, seed, lambda tensor, seed: quantize(tensor, values, seed), weighting, budget)


def ranks(rank: int) -> dict[str, int]:
    return dict.fromkeys(SHAPES, rank)


def initial(rank: int = RANK, seed: int = 3) -> LoraState:
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
            change = size * torch.randn(pair.rank, pair.rank, generator=generator)
            return LoraPair(pair.A + change @ core[module].A, pair.B)
        noise = {part: size * torch.randn(pair.part(part).shape, generator=generator) for part in ("A", "B")}
        return LoraPair(*(pair.part(part) + noise[part] * (part in parts) for part in ("A", "B")))

    after = LoraState({module: moved(module, pair) for module, pair in state.adapter.items()})
    return Trained(after, num_examples=1 + seed % 7, loss=1.0, steps=1)


def trainer(method: Method, *, size: float = 0.1):
    """The toy step, moving only what the method trains in that round."""
    return lambda state, round, seed: step(
        state, round, seed, size=size, parts=method.trainable(round), core=method.core(state)
    )


class Federation:
    """Server and clients in one process, every payload through the wire."""

    def __init__(self, job: Job, clients: dict[str, int] | None = None, *, train=None) -> None:
        self.job = job
        self.train = train or trainer(job.method)
        client_ranks = clients or {"ada": RANK, "bob": RANK, "cyd": RANK}
        top = initial(max(client_ranks.values()))
        self.server = start(job, top)
        self.clients = {name: start(job, top, ranks(rank)) for name, rank in client_ranks.items()}
        self.broadcasts: list[bytes] = []
        self.round = 0

    def play(self, attending: list[str] | None = None) -> None:
        """One round with the named clients (all of them by default), each first brought in step."""
        self.round += 1
        payloads = {}
        for name in attending or list(self.clients):
            state = self.clients[name]
            turn = client_turn(self.job, name, state, self.missed(name), self.train, self.round)
            self.clients[name], payloads[name] = turn.state, turn.payload
        turn = server_turn(self.job, self.server, payloads, self.round)
        assert not turn.refused
        self.server = turn.state
        self.broadcasts.append(turn.payload)
        self.uploads = payloads

    def missed(self, name: str) -> list[bytes]:
        state = self.clients[name]
        return [addressed(self.job, p, state.adapter.ranks()) for p in self.broadcasts[state.version :]]

    def settle(self) -> None:
        """Give every client what it has missed."""
        for name, state in self.clients.items():
            for payload in self.missed(name):
                state = accept(self.job, state, payload)
            self.clients[name] = state


def delta(state: LoraState) -> dict[str, torch.Tensor]:
    """Dense ΔW in float64, module by module."""
    return {module: pair.B.double() @ pair.A.double() for module, pair in state.items()}


def client_seed(job: Job, client: str, round: int) -> int:
    """The seed that the client's training step gets."""
    return derived_seed(job.seed, "train", client, round)
