"""What server and clients agree on before the first round."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

from fedloom.compress.budget import Budget
from fedloom.compress.seeds import derived_seed
from fedloom.compress.sparsify import Quantize
from fedloom.methods.method import Context, Method
from fedloom.rounds.caps import Caps
from fedloom.rounds.consolidation import Consolidation


@dataclass(frozen=True, slots=True)
class Job:
    """The method, and how a run uses it.

    quantize codes the values of both directions; budget is what a client's payload may take, at most; weighting and
    module_weighting say what a client counts for (`cohort`); consolidation, when the server recompresses its state;
    num_rounds, how long the run is, 0 where that is not known; downloads, how many broadcasts go down in a client's
    turn on the mean, those that it missed included, times what the server's adapter has of the client's values.
    caps bounds what one client may count for. ranks: client → module that it trains → rank; empty where that is not
    known, and then an update is held to the server's adapter alone. tops: module → the largest of these ranks.
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
    ranks: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    tops: Mapping[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        tops: dict[str, int] = {}
        for own in self.ranks.values():
            for module, rank in own.items():
                tops[module] = max(rank, tops.get(module, 0))
        object.__setattr__(self, "tops", tops)

    def context(self, round: int, party: str = "") -> Context:
        """The context of one round; a client's has a seed of its own, the server's and a broadcast's do not."""
        seed = derived_seed(self.seed, "client", party) if party else self.seed
        budget = self.method.budget(self.budget)
        return Context(round, seed, self.quantize, budget, num_rounds=self.num_rounds, downloads=self.downloads)


def sender_digest(client: str, base_digest: str, round: int) -> str:
    """32 hex digits that an update carries as its result digest: they name its sender, in one round of one run.

    They keep a client from being counted with bytes that another client's turn made. They are no signature.
    """
    named = f"{client}\x00{base_digest}\x00{round}".encode(errors="surrogatepass")
    return hashlib.blake2b(named, digest_size=16).hexdigest()
