"""How loom's bytes are divided: over both ways, over the rounds, over the broadcasts that a turn begins with."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fedloom.compress.budget import Budget
from fedloom.compress.paths import MOST
from fedloom.errors import ConfigError
from fedloom.lora.pair import LoraState
from fedloom.methods.method import Context
from fedloom.methods.spending import RunShape, Spending

BUDGET = 0.01
"""Share of dense fp32 where no budget is set."""

_RARE = 6.0
"""Broadcasts from turn to turn above which the whole adapter goes down: at nine it is the better, at five not."""
_UP, _UP_RARE, _UP_STATES = 0.42, 0.27, 0.35
"""Share of the bytes that goes up: where all attend, where some do, and where whole adapters go down."""
_TAPER = 0.5
_SIGN_BITS, _PATH_BITS, _STATE_BITS, _CORE_BITS = 0.5, 0.7, 1.2, 1.0
"""Bits of a payload for a value, mean of both ways: with fewer, a lower rank does better (docs/LOG.md)."""
_PATHS_BELOW = 1 / 3
"""Share of the largest rank above which signs of a higher rank do better than paths (docs/LOG.md)."""
_LONG, _LONG_SOME = 3.0, 2.0
"""Times the clients' mean that the server goes where changes travel as paths: where all attend, and where some do."""
_WIDE, _WIDE_BITS, _WIDE_LONG, _WIDE_MOST = 640, 0.25, 1.5, 1.5
"""Mean m + n of modules from which changes travel as paths of more rank, in so few bits a value, and the server's times
the mean there; bits a value of the whole rank above which they do not. The demo's modules have 320 (docs/LOG.md).
"""


@dataclass(frozen=True, slots=True)
class Dial:
    """How the bytes of both ways are divided: the share `up` of them goes up.

    most: largest share of a tensor's elements that may be sent. taper: how much the first rounds take from the last.
    newest: whether a client needs the newest broadcast alone, so that what everybody is sent at the end is as large as
    the last one is.
    """

    up: float
    most: float
    taper: float
    newest: bool = False

    def __post_init__(self) -> None:
        for key, share in (("upload_share", self.up), ("max_density", self.most)):
            if not 0.0 < share <= 1.0:
                raise ConfigError(f"method.{key} is {share}: expected more than 0 and at most 1")
        if not -1.0 < self.taper <= 1.0:
            raise ConfigError(f"method.taper is {self.taper}: expected more than -1 and at most 1")

    def bytes(self, adapter: LoraState, direction: str, context: Context) -> int:
        """What a payload in this direction may take. `adapter`: what dense fp32 would send, the measure of a budget."""
        both = 2 * (context.budget or Budget(BUDGET)).bytes(adapter.numel())
        downloads = 1.0 + (context.downloads - 1.0) * (1.0 - self.taper) if self.newest else context.downloads
        part = self.up if direction == "up" else (1.0 - self.up) / downloads
        return int(both * part * self.weight(context.round, context.num_rounds))

    def smallest(self, adapter: LoraState, context: Context) -> int:
        """The bytes of the smallest payload of a run: the first or the last one, up or down."""
        ends = [replace(context, round=number) for number in (1, max(context.num_rounds, 1))]
        return min(self.bytes(adapter, way, end) for way in ("up", "down") for end in ends)

    def weight(self, round: int, num_rounds: int) -> float:
        """A round's bytes over the mean of all rounds; it falls from 1 + taper to 1 − taper."""
        done = (round - 0.5) / num_rounds if num_rounds else 0.5
        return 1.0 + self.taper * (1.0 - 2.0 * min(done, 1.0))


def spend_run(shape: RunShape, size: float, *, paths: bool = True) -> Spending:
    """How loom divides a client's bytes of a whole run: rank, mode and ways by the rules that the trials led to.

    paths: whether changes may travel as paths.
    """
    payload = size / (2 * shape.turns)
    states, all_attend = shape.broadcasts > _RARE, shape.broadcasts <= 1.0
    wide = paths and not states and _is_wide(shape, payload)
    up = _UP_STATES if states else _UP if all_attend or wide else _UP_RARE
    down = 1.0 + 1.0 / shape.turns if states else shape.broadcasts
    mean = payload * (up + (1.0 - up) / down)

    def rank_at(bits: float) -> int:
        return min(max(round(8 * mean / (bits * shape.per_rank)), 1), shape.most_rank)

    rank = rank_at(_STATE_BITS if states else _WIDE_BITS if wide else _PATH_BITS)
    settings: dict[str, bool | int | float | str] = {"upload_share": up, "broadcast": "state" if states else "change"}
    few = rank <= _PATHS_BELOW * shape.most_rank and rank * shape.per_rank <= MOST
    if not states and paths and (few or wide):
        long = _WIDE_LONG if wide else _LONG if all_attend else _LONG_SOME
        settings |= {"coding": "paths", "server_learning_rate": long}
    elif not states:
        rank = rank_at(_SIGN_BITS)
        settings |= {} if all_attend else {"taper": _TAPER}
    what = "the whole adapter" if states else "changes"
    said = (
        f"loom sends {what} of rank {rank} (lora.r is {shape.most_rank}), {2 * payload * up:,.0f} bytes up "
        f"in a turn and {2 * payload * (1.0 - up) / down:,.0f} in a broadcast, on the mean of all rounds"
    )
    return Spending(rank, payload, settings, said)


def _is_wide(shape: RunShape, payload: float) -> bool:
    """Whether the modules are so wide that changes had better travel as paths of much rank, and those can be sought."""
    values = shape.per_rank * shape.most_rank
    return _WIDE * shape.modules <= shape.per_rank and values <= MOST and 8 * payload <= _WIDE_MOST * values


def spend_on_core(shape: RunShape, size: float) -> Spending:
    """How a core between resting factors takes a client's bytes of a whole run: the rank whose core they can say."""
    payload = size / (2 * shape.turns)
    states = shape.broadcasts > 1.0
    up = _UP_STATES if states else _UP
    down = 1.0 + 1.0 / shape.turns if states else 1.0
    mean = payload * (up + (1.0 - up) / down)
    rank = int((8 * mean / (_CORE_BITS * shape.modules)) ** 0.5)
    rank = min(max(rank, 1), shape.most_rank)
    settings = {"upload_share": up, "broadcast": "state" if states else "change"}
    said = (
        f"lora-xs sends a core of rank {rank} (lora.r is {shape.most_rank}), {2 * payload * up:,.0f} bytes up in a "
        f"turn and {2 * payload * (1.0 - up) / down:,.0f} in a broadcast, on the mean of all rounds"
    )
    return Spending(rank, payload, settings, said)
