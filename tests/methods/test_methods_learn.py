"""A toy problem that every method has to learn with clients of ranks 16, 8 and 4: none may end near where it began."""

from __future__ import annotations

import pytest
import torch

from fedloom.lora.pair import LoraPair, LoraState, core_matrix
from fedloom.methods.method import Method, State
from fedloom.methods.table import METHODS, build
from fedloom.rounds.step import Train, Trained
from toy import CLIENTS_OF_SCALARS, Federation, job

SHAPES = {"layers.0.k_proj": (20, 32)}
CAST = {"ada": 16, "bob": 8, "cyd": 4}
ROUNDS, STEPS, RATE = 12, 4, 0.005


def targets() -> dict[str, dict[str, torch.Tensor]]:
    """Client → module → the ΔW of rank 6 that it wants; all want most of it alike."""
    generator = torch.Generator().manual_seed(0)

    def low_rank(m: int, n: int) -> torch.Tensor:
        return torch.randn(m, 6, generator=generator) @ torch.randn(6, n, generator=generator) / 5 / (m * n) ** 0.25

    common = {module: low_rank(*shape) for module, shape in SHAPES.items()}
    return {
        client: {module: common[module] + 0.3 * low_rank(*shape) for module, shape in SHAPES.items()} for client in CAST
    }


def loss(state: LoraState, wanted: dict[str, torch.Tensor], fixed: LoraState | None = None) -> torch.Tensor:
    """Σ ‖ΔW − wanted‖² over the modules, halved."""
    total = torch.zeros(())
    for module, pair in state.items():
        beside = fixed[module].B @ fixed[module].A if fixed and module in fixed else 0.0
        total = total + (pair.B @ pair.A + beside - wanted[module]).square().sum() / 2
    return total


def learner(method: Method, wanted: dict[str, torch.Tensor]) -> Train:
    """Some steps of Adam on what the method trains."""

    def train(state: State, round: int, seed: int) -> Trained:
        core, parts = method.core(state), method.trainable(round)
        begun = {f"{m}/{part}": pair.part(part).clone() for m, pair in state.adapter.items() for part in "AB"}
        matrices = {module: core_matrix(state.adapter[module].A, pair.A) for module, pair in core.items()}
        live = {n: t.requires_grad_() for n, t in (matrices or begun).items() if matrices or n[-1] in parts}

        def adapter() -> LoraState:
            rows = {module: matrices[module] @ core[module].A for module in matrices}
            return LoraState(
                {m: LoraPair(rows.get(m, begun[f"{m}/A"]), begun[f"{m}/B"]) for m in state.adapter},
            )

        optimiser = torch.optim.Adam(live.values(), lr=RATE)
        for _ in range(STEPS):
            optimiser.zero_grad()
            loss(adapter(), wanted, state.fixed).backward()
            optimiser.step()
        return Trained(adapter().map(lambda pair: LoraPair(pair.A.detach(), pair.B.detach())), 1, 0.0)

    return train


# What is between lora-xs's factors: test_lora_xs. Who learns without gradients: test_scalars.
@pytest.mark.parametrize("name", sorted(set(METHODS) - {"lora-xs", *CLIENTS_OF_SCALARS}))
def test_every_method_learns_with_clients_of_unequal_rank(name: str):
    method, wanted = build(name), targets()
    budgets = {"loom": "10%", "sparseloco": "20%"}  # where a client has one module, less is no payload of the latter
    federation = Federation(job(method, budget=budgets.get(name)), CAST, shapes=SHAPES)
    steps = {client: learner(federation.job.method, wanted[client]) for client in CAST}

    def distance() -> float:
        return sum(float(loss(federation.server.total, own)) for own in wanted.values())

    before = distance()
    for _ in range(ROUNDS):
        federation.settle()
        assert not federation.round(steps).refused
    assert distance() < 0.85 * before
