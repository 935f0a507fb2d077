"""What [privacy] makes of a run, and what does not go with it."""

from __future__ import annotations

import math
from collections.abc import Mapping

from fedloom.errors import ConfigError, SecureSumError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Method, State
from fedloom.methods.table import METHODS, build
from fedloom.model.training import SCHEDULES
from fedloom.noise.accounting import concentrated_epsilon
from fedloom.records.config import Config, FederationSettings
from fedloom.records.sections.privacy import MOST_IN_SUM
from fedloom.report.numbers import human_bytes
from fedloom.rounds.job import Job, group_alike
from fedloom.rounds.secure import cannot_hide, count_values
from fedloom.rounds.sums import Secure, SumNoise
from fedloom.secagg import Grid
from fedloom.secagg.noise import MOST_DEVIATION, share_deviation

DELTA = 1e-6
"""At which the ε of noise in sums is stated."""
_JUDGES = {
    "max_norm_ratio": "compares the norms of single updates; federation.max_norm is kept, by every site for itself",
    "max_share": "bounds a share that nobody sees; privacy.most_examples bounds what a site counts for",
    "client_examples": "is about weights that each site adds up itself; privacy.most_examples bounds them",
}
"""Keys of [federation] that need single updates → why. At their defaults they are not applied."""


def plan_sums(config: Config, method: Method, client_ranks: Mapping[str, Mapping[str, int]]) -> Secure | None:
    """How sums are made, where privacy.secure_aggregation is on. Raises ConfigError for what does not go with it."""
    privacy, federation = config.privacy, config.federation
    if not privacy.secure_aggregation:
        return None
    if method.adds is None:
        raise cannot_hide(method, ", ".join(sorted(name for name in METHODS if build(name).adds)))
    _check_federation(federation)
    _check_alike(client_ranks)
    asked = federation.clients_per_round(len(client_ranks))
    _check_numbers(config, asked)
    try:
        grid = Grid.reaching(privacy.clip, privacy.bits, asked)
    except SecureSumError as error:
        raise ConfigError(f"privacy.bits is {privacy.bits}: {error}") from None
    grid, noise = _add_noise(config, grid)
    return Secure(grid, privacy.most_examples, privacy.least_cohort, privacy.threshold, noise, _plan_scales(config))


def _plan_scales(config: Config) -> tuple[float, ...]:
    """By how much the grid is finer in each round than in the first. A warmup is no reason to make it finer."""
    if config.privacy.clip_schedule == "constant":
        return ()
    if config.privacy.noise_multiplier is not None:
        raise ConfigError(
            "privacy.clip_schedule = 'learning_rate' does not go with privacy.noise_multiplier: the noise is as large "
            "in every round, and so has the grid to be. Leave one of them out"
        )
    rounds, course = config.federation.num_rounds, SCHEDULES[config.training.lr_scheduler_type]
    return tuple(course(over / rounds) for over in range(rounds))


def _add_noise(config: Config, grid: Grid) -> tuple[Grid, SumNoise | None]:
    """The noise in every sum, and a grid no finer than it can be drawn on. Raises ConfigError where it has no room."""
    privacy = config.privacy
    if privacy.noise_multiplier is None:
        return grid, None
    whole, least = privacy.noise_multiplier * privacy.clip_norm, privacy.least_cohort
    while whole / math.sqrt(least) > (MOST_DEVIATION - 1) * grid.step and grid.bits > 2:
        grid = Grid.reaching(privacy.clip, grid.bits - 1, grid.sites)
    share = share_deviation(whole / grid.step, least)
    # Ten deviations: a value beyond them comes once in 10^23.
    room = privacy.clip_norm + 10 * share * grid.step
    if room > grid.reach:
        raise ConfigError(
            f"privacy.clip is {privacy.clip:g}, which has no room for a change of norm {privacy.clip_norm:g} with its "
            f"noise: set it to {room:.2g} or more"
        )
    return grid, SumNoise(privacy.clip_norm, share, least)


def describe_sum_noise(job: Job, adapter: LoraState, rounds: int) -> str:
    """What the noise in the sums of a run is worth, in words; "" without it."""
    secure = job.secure
    if secure is None or secure.noise is None:
        return ""
    values = count_values(job, State(adapter), 1)
    try:
        worth = concentrated_epsilon(rounds * secure.noise.cost(secure.grid.step, values), DELTA)
    except ConfigError as error:
        return f"noise in the sum; {error}"
    return (
        f"noise in the sum: ε = {worth:.3g} at site level for all {rounds} rounds, at δ = {DELTA:g}, for who trusts "
        f"that {secure.noise.least} sites add their shares"
    )


def _check_federation(federation: FederationSettings) -> None:
    if federation.mode == "buffered":
        raise ConfigError(
            "privacy.secure_aggregation adds the updates of one version up, and with federation.mode = 'buffered' each "
            "comes by itself and from a version of its own: leave one of them out"
        )
    if federation.regions is not None:
        raise ConfigError(
            "privacy.secure_aggregation and federation.regions exclude each other: a regional server checks single "
            "updates, which nobody sees under secure aggregation; leave one of them out"
        )
    for key, reason in _JUDGES.items():
        if getattr(federation, key) != FederationSettings.model_fields[key].default:
            raise ConfigError(f"federation.{key} does not go with privacy.secure_aggregation: it {reason}. Unset it")


def _check_alike(client_ranks: Mapping[str, Mapping[str, int]]) -> None:
    """What only some of the clients train would be the sum of those alone."""
    kinds = group_alike(client_ranks)
    for client, ranks, _ in kinds[1:]:
        if ranks != kinds[0][1]:
            raise ConfigError(
                f"privacy.secure_aggregation needs clients that all train the same modules at the same ranks, and "
                f"{client} differs from {kinds[0][0]}: what only some train would be the sum of those alone. Leave r, "
                "rank_pattern and target_modules out of [clients]"
            )


def _check_numbers(config: Config, asked: int) -> None:
    """Raises ConfigError where a round asks too few clients for any sum, or too many for one."""
    privacy = config.privacy
    if asked > MOST_IN_SUM:
        raise ConfigError(
            f"privacy.secure_aggregation adds up {MOST_IN_SUM} sites at most, and a round asks {asked}: lower "
            "federation.fraction_train"
        )
    for key, least in (("least_cohort", privacy.least_cohort), ("threshold", privacy.threshold)):
        if isinstance(least, int) and least > asked:
            raise ConfigError(
                f"privacy.{key} is {least}, but a round asks {asked} client{'s' * (asked > 1)}: no sum could ever be "
                "made"
            )


def describe_masked(job: Job, adapter: LoraState) -> str:
    """That a secure sum sends what the method would leave out, or fewer values than it could, in words; else ""."""
    if job.secure is None or not job.method.takes_budget:
        return ""
    grid = job.secure.grid
    if job.method.support is not None:
        few = (2 * grid.sites + 1).bit_length() + 1  # at one bit less a site says −1, 0 or 1
        if grid.bits <= 2 * few:
            return ""
        return (
            f"secure aggregation: a value takes {grid.bits} bits of wire.budget; with privacy.bits = {few}, and a "
            f"privacy.clip about as large as a value's largest change, {grid.bits / few:.1f} times as many travel"
        )
    size = human_bytes(count_values(job, State(adapter), 1) * grid.bits / 8)
    return (
        f"secure aggregation: every site sends {size} a round. Method {job.method.name!r} with these settings does not "
        "say beforehand which values travel, so all do under masks; wire.budget is not kept on the way up"
    )
