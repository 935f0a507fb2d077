"""FlexLoRA: the best approximation of the aggregate at each client's own rank.

(Bai et al., NeurIPS 2024, arXiv 2402.11505)

Singular components are nested: a client of rank q is sent the first q of those of the largest rank, in factored form,
and trains on from them. What lies beyond the largest rank is lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from fedloom.lora.pair import PARTS, LoraPair, LoraState
from fedloom.methods.method import Aggregate, Context, Facts, Method, State, Update, both_factors
from fedloom.methods.shared.averaging import dense_entries, narrow_factors, product_sums, send_factors
from fedloom.methods.shared.components import go_on


def flexlora() -> Method:
    """B_g = U √Σ, A_g = √Σ Vᵀ: both factors of one size, as trained ones are."""
    return Method(
        name="flexlora",
        facts=Facts(
            paper="FlexLoRA (arXiv 2402.11505)",
            unequal_ranks=True,
            own_part=True,
            receives="A and B of its own rank, dense",
            broadcasts="components",
            stateless=True,
            truncates="rank",
        ),
        compress=partial(send_factors, both_factors),
        aggregate=best_approximation,
        receive=go_on,
        replaces=PARTS,
        narrow=narrow_factors,
    )


def best_approximation(state: State, updates: Iterable[Update], context: Context) -> Aggregate:
    """The leading components of Σ p_k B_k A_k, as many as the server's adapter has."""
    sums = product_sums(updates, state.adapter, capped=True)
    cuts = {module: total.truncate(rank=state.adapter[module].rank) for module, total in sums.items()}
    lead = LoraState({module: balance_factors(cut.pair) for module, cut in cuts.items()})
    kept = {module: 1.0 - cut.lost_energy for module, cut in cuts.items()}
    lost = max((cut.lost_energy for cut in cuts.values()), default=0.0)
    return Aggregate(dense_entries(lead, context), {}, {"max_lost_energy": lost}, kept)


def balance_factors(pair: LoraPair) -> LoraPair:
    """The same product with each component's size shared evenly between B's column and A's row."""
    size = pair.B.norm(dim=0).clamp_min(1e-30).sqrt()
    return LoraPair(pair.A * size[:, None], pair.B / size)
