"""FLoRIST: the exact aggregate in factored form, its rank cut by energy (Ramesh & Dass, MLSys 2026, arXiv 2506.09199).

The server broadcasts the leading singular components of Σ p_k B_k A_k. How clients take them up is a setting:

    merge_reinit  (paper)          merge the broadcast into the base, begin a fresh LoRA
    continue      (released code)  train on from the leading r_k components, drop the others
    warm          (fedloom)        train on from the leading r_k components, keep the others frozen

With "warm" the components beyond the largest rank are merged for good; those between a client's own rank and the
largest are its `tail`, which the server adds back to that client's contribution. So nothing is lost, everybody uses
the same weights, and nobody starts again from zero.

The paper chooses τ anew for every experiment and reports two: O, the best, and E, the lowest that still matches the
other methods. `fedloom tune` does that on the validation split, on which no score is taken (docs/tuning.md): a τ chosen
by the score that is then reported would be chosen with knowledge of the answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Literal

from fedloom.errors import ConfigError
from fedloom.lora.lowrank import ProductSum, map_modules, truncation_cost
from fedloom.lora.pair import PARTS, LoraPair, LoraState
from fedloom.methods.method import (
    FROZEN,
    Aggregate,
    Context,
    Facts,
    Method,
    State,
    Update,
    adopt_leading,
    both_factors,
)
from fedloom.methods.shared.averaging import dense_entries, product_sums, send_factors
from fedloom.methods.shared.components import (
    adopt_warm,
    components,
    components_beyond,
    go_on,
    go_on_warm,
    restart,
)
from fedloom.methods.shared.guard import judge_products, remember_adapter

ClientInit = Literal["merge_reinit", "continue", "warm"]


def florist(*, tau: float = 0.99, client_init: ClientInit = "warm", step_guard: bool = True) -> Method:
    """tau: share of the squared singular values that is broadcast, 0 < tau ≤ 1; client_init: see the module.

    step_guard: shorten the server's steps where the clients undo the last one (`shared.guard`); with "warm" and tau < 1
    only, since at tau = 1 the aggregate is to be exact.
    """
    if not 0.0 < tau <= 1.0:
        raise ConfigError(f"method.tau is {tau}: expected 0 < tau ≤ 1 (the paper uses 0.8 to 0.99)")
    guard = step_guard and client_init == "warm" and tau < 1.0
    return Method(
        name="florist",
        facts=Facts(
            paper="FLoRIST (arXiv 2506.09199)",
            exact=tau == 1.0 and client_init != "continue",
            unequal_ranks=True,
            own_part=client_init == "continue",
            receives="singular components up to the energy tau",
            keeps="merged increments; server: its last adapter" if guard else "merged increments",
            broadcasts="components",
            stateless=True,
            truncates="energy",
        ),
        compress=partial(send_factors, both_factors),
        aggregate=partial(leading_components, tau, client_init, guard),
        receive={"merge_reinit": restart, "continue": go_on, "warm": go_on_warm}[client_init],
        merges=client_init != "continue",
        replaces=PARTS if client_init == "continue" else (),
        adopt=adopt_warm if client_init == "warm" else adopt_leading,
        values="int8",
    )


def leading_components(
    tau: float, client_init: ClientInit, guard: bool, state: State, updates: Iterable[Update], context: Context
) -> Aggregate:
    """B_g = U_p Σ_p, A_g = V_pᵀ of ΔW* = Σ p_k B_k A_k, p the least rank that holds the share tau of the energy.

    Below tau = 1 the sum is capped, so that a large cohort stays bounded: what that loses is in `max_lost_energy`.
    With a gain γ < 1 it is γ ΔW* + (1 − γ) B A, the adapter that the round began with.
    """
    tail = partial(components_beyond, state.adapter) if client_init == "warm" else None
    sums = product_sums(updates, state.adapter, capped=tau < 1.0, beside=tail)
    modules = list(sums)
    costs = [truncation_cost(one.shape, one.rank) for one in sums.values()]
    cut_all = map_modules(lambda module: sums.pop(module).truncate(energy=tau), modules, costs)
    cuts = dict(zip(modules, cut_all, strict=True))
    verdict = judge_products(state, {module: cut.pair for module, cut in cuts.items()}) if guard else None
    if verdict and min(verdict.gains.values(), default=1.0) < 1.0:
        held = state.adapter
        cuts = {
            module: damp(cut.pair, held[module], verdict.gains[module]).truncate(energy=tau)
            for module, cut in cuts.items()
        }
    trained = {module: 0 if client_init == "merge_reinit" else pair.rank for module, pair in state.adapter.items()}
    lead = LoraState({module: components(cut.pair, 0, trained[module]) for module, cut in cuts.items()})
    rest = LoraState({module: components(cut.pair, trained[module]) for module, cut in cuts.items()})
    broadcast = {
        "merge_reinit": dense_entries(rest, context, FROZEN),
        "continue": dense_entries(lead, context),
        "warm": dense_entries(lead, context) | dense_entries(rest, context, FROZEN),
    }[client_init]
    ranks = [cut.pair.rank for cut in cuts.values()]
    lost = max((cut.lost_energy for cut in cuts.values()), default=0.0)
    kept = {module: 1.0 - cut.lost_energy for module, cut in cuts.items()}
    stats = {"mean_rank": sum(ranks) / max(len(ranks), 1), "max_lost_energy": lost}
    if verdict is None:
        return Aggregate(broadcast, {}, stats, kept)
    return Aggregate(broadcast, {**state.memory, **remember_adapter(state, verdict)}, {**stats, **verdict.stats}, kept)


def damp(whole: LoraPair, held: LoraPair, gain: float) -> ProductSum:
    """γ of the aggregate and 1 − γ of the adapter that the round began with."""
    total = ProductSum(whole.shape)
    total.add(whole, gain)
    total.add(held, 1.0 - gain)
    return total
