"""`wire.client_budget`: settings that keep a client's bytes of the whole run within bounds, from those that were given.

What was chosen stands in the settings that a run works with, so that everything after this knows of a payload's budget
and a rank alone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from statistics import fmean

from fedloom.errors import ConfigError
from fedloom.methods.method import Method
from fedloom.methods.spending import RunShape, Spending
from fedloom.methods.table import build
from fedloom.model.placement import LinearModule, place_adapter
from fedloom.records.config import Config, MethodSettings
from fedloom.records.quantities import parse_client_budget

_MOST_LIFT = 2.0
"""How much the scale of ΔW rises at most where the rank falls (docs/LOG.md)."""


def spend_client_budget(
    linear: Mapping[str, LinearModule], config: Config, data: Collection[int] | None, clients: int, method: Method
) -> tuple[Config, str]:
    """(the settings of the run, what was chosen in words); the settings as they are where wire.client_budget is unset.

    data: bytes of every client's examples, compressed; None where they are not at hand. Raises ConfigError where the
    method cannot divide a run's bytes, or ranks are set client by client or module by module.
    """
    asked = config.wire.client_budget
    if asked is None:
        return config, ""
    if method.spend is None or method.name != config.method.name:
        raise ConfigError(
            f"wire.client_budget does not work with method {method.name!r}, which does not choose how much it sends in "
            'a run; take method.name = "loom", or unset it'
        )
    own = [f"clients.{name}" for name, client in config.clients.items() if client.rank_pattern or client.r is not None]
    for table in (["lora"] if config.lora.rank_pattern else []) + own:
        raise ConfigError(
            f"{table} sets ranks of its own, and wire.client_budget chooses one for all: unset them, or set "
            "wire.budget in place of wire.client_budget"
        )
    federation = config.federation
    ones = place_adapter(linear, config.lora.model_copy(update={"r": 1}))
    per_rank = sum(sum(shape) for shape in ones.shapes.values())
    shape = RunShape(
        per_rank, len(ones.shapes), config.lora.r, federation.num_rounds, clients, federation.clients_per_round(clients)
    )
    chosen = method.spend(shape, total_bytes(asked, data, shape))
    return apply_spending(config, chosen, per_rank), f"wire.client_budget of {asked}: {chosen.said}"


def total_bytes(asked: str, data: Collection[int] | None, shape: RunShape) -> float:
    """The bytes that a client's budget means. Raises ConfigError where it is of data that nobody has counted.

    A share of dense is of fp32 values at the largest rank: up and down in every turn, but nothing down before the first
    round, and the result to everybody.
    """
    budget = parse_client_budget(asked)
    if budget.size:
        return budget.size
    if budget.of_dense:
        payloads = 2 * shape.turns - 1 / shape.broadcasts + 1
        return budget.of_dense * payloads * 4 * shape.per_rank * shape.most_rank
    if not data or not all(data):
        raise ConfigError(
            f"wire.client_budget is {asked!r}, but the clients' examples are not all at hand here: give it in bytes "
            "or as a share of dense fp32, such as '0.3%'"
        )
    return budget.of_data * fmean(data)


def apply_spending(config: Config, chosen: Spending, per_rank: int) -> Config:
    """The settings with what was chosen; a setting of the method that was given stays as it was given."""
    lora = config.lora
    # At a lower rank ΔW has fewer components, so each has to move further: the scale follows alpha / √r (rsLoRA).
    lift = min((lora.r / chosen.rank) ** 0.5, _MOST_LIFT)
    share = chosen.rank / lora.r
    alpha = lora.lora_alpha * lift * (share**0.5 if lora.use_rslora else share)
    settings = {**chosen.settings, **config.method.settings}
    build(config.method.name, settings)  # names what does not go together
    # Below the largest rank values travel as signs, which a budget in bytes means; at it there may be room for more.
    full = chosen.rank == lora.r
    budget = f"{100 * chosen.payload / (4 * per_rank * lora.r):.6f}%" if full else f"{int(chosen.payload)}"
    update = {
        "lora": lora.model_copy(update={"r": chosen.rank, "lora_alpha": alpha}),
        "method": MethodSettings.model_validate({"name": config.method.name, **settings}),
        # Shares of dense bytes stay those of the rank that was asked for.
        "output": config.output.model_copy(update={"baseline_r": config.output.baseline_r or lora.r}),
        "wire": config.wire.model_copy(update={"budget": budget, "client_budget": None}),
    }
    return config.model_copy(update=update)
