"""What server and clients agree on before the first round."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedloom.compress.budget import Budget
from fedloom.compress.seeds import derived_seed
from fedloom.compress.sparsify import Quantize
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Context, Method
from fedloom.rounds.caps import Caps
from fedloom.rounds.consolidation import Consolidation
from fedloom.rounds.sums import Secure


@dataclass(frozen=True, slots=True)
class Robust:
    """How a round withstands liars. rule: "none", "clip" or one of `rules.RULES`; malicious: f, None for K // 4.

    clip_ratio: norm over the round's median above which a share is cut, by the square. public: whether updates are
    tried on public examples; tolerance: see `trial.Trial`.
    """

    rule: str = "none"
    malicious: int | None = None
    clip_ratio: float = 1.5
    public: bool = False
    tolerance: float = 0.02

    def faults(self, clients: int) -> int:
        """Liars that are reckoned with among so many clients."""
        return max(clients // 4, 1) if self.malicious is None else self.malicious


@dataclass(frozen=True, slots=True)
class Job:
    """The method, and how a run uses it.

    quantize: codes the values of both directions. budget: the most that a client's payload may take.
    weighting, module_weighting: what a client counts for (see `cohort`). consolidation: when the server recompresses.
    num_rounds: length of the run, 0 where it is not known. downloads: broadcasts that a client receives in a turn, on
    the mean, missed ones included; a broadcast of an adapter twice the client's size counts as two.
    start: the adapter that the run begins with, where it is known. caps: bounds on what one client may count for;
    robust: how a round withstands liars.
    ranks: client → module that it trains → rank; where it is empty, an update is compared with the server's adapter
    alone. tops: module → the largest of these ranks. secure: how sums are made whose summands nobody sees; None where
    the server is sent every update. scratch: a folder for large payloads, which then lie in files without a name and
    not in memory (`filed`).
    """

    method: Method
    seed: int
    quantize: Quantize
    weighting: str = "examples"
    budget: Budget | None = None
    module_weighting: str = "holders"
    consolidation: Consolidation = Consolidation()
    num_rounds: int = 0
    downloads: float = 1.0
    caps: Caps = field(default_factory=Caps)
    robust: Robust = Robust()
    ranks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    start: LoraState = field(default_factory=LoraState, repr=False)
    secure: Secure | None = None
    scratch: Path | None = None
    tops: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tops", find_tops(self.ranks))

    def context(self, round: int, party: str = "") -> Context:
        """The context of one round. A client has a seed of its own; the server and broadcasts use the run's seed."""
        seed = derived_seed(self.seed, "client", party) if party else self.seed
        budget = self.method.budget(self.budget)
        return Context(
            round,
            seed,
            self.quantize,
            budget,
            num_rounds=self.num_rounds,
            downloads=self.downloads,
            start=self.start,
            summed_bits=self.secure.grid.bits if self.secure else 0,
        )


def group_alike(ranks: Mapping[str, Mapping[str, int]]) -> list[tuple[str, Mapping[str, int], int]]:
    """(the first client, its ranks, how many clients share that very mapping), in order of the first.

    Crowds are few kinds: what is asked of each kind need not be asked of each client.
    """
    kinds: dict[int, tuple[str, Mapping[str, int], int]] = {}
    for client, own in ranks.items():
        first, _, count = kinds.get(id(own), (client, own, 0))
        kinds[id(own)] = first, own, count + 1
    return list(kinds.values())


def find_tops(ranks: Mapping[str, Mapping[str, int]]) -> dict[str, int]:
    """The largest rank of each module among the clients that train it."""
    tops: dict[str, int] = {}
    for _, own, _ in group_alike(ranks):
        for module, rank in own.items():
            tops[module] = max(rank, tops.get(module, 0))
    return tops


def sender_digest(client: str, base_digest: str, round: int) -> str:
    """32 hex digits that name the sender of an update, in one round of one run; its header has them as result digest.

    They keep one client's bytes from counting as another's by mistake. They are not a signature.
    """
    named = f"{client}\x00{base_digest}\x00{round}".encode(errors="surrogatepass")
    return hashlib.blake2b(named, digest_size=16).hexdigest()
