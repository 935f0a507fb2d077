"""How much one client may count for: its share of the average, and the norm of its update.

A client itself says how many examples its update rests on, and nobody else knows its values. So two bounds limit what
one client can do to the average: its share has a maximum, and its norm must be in proportion to the others'.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

FEWEST = 3
"""Updates that a comparison of norms needs: of two, nobody can say which one is wrong."""


@dataclass(frozen=True, slots=True)
class Caps:
    """The bounds of a run; these defaults bound nothing, those of [federation] are `USUAL`.

    max_share: of the average, for one client; of K clients each may have 1/K whatever it says. client_examples: the
    operator's own numbers of examples, by client, in place of those that the clients tell. max_norm: √Σ v² over the
    values of an update. max_norm_ratio: that norm over the median of the round. max_examples: that a client may tell.
    """

    max_share: float = 1.0
    client_examples: Mapping[str, int] = field(default_factory=dict)
    max_norm: float = math.inf
    max_norm_ratio: float = math.inf
    max_examples: float = math.inf


USUAL = Caps(max_share=0.5, max_norm=1e6, max_norm_ratio=100.0)


def share_out(examples: Mapping[str, int], weighting: str, caps: Caps) -> tuple[dict[str, float], list[str]]:
    """(p_k of every client, what was bounded in words). Shares are by examples, or "uniform"; they sum to 1."""
    told = {client: min(count, caps.max_examples) for client, count in examples.items()}
    counts = {client: caps.client_examples.get(client, count) for client, count in told.items()}
    sizes = {client: 1.0 if weighting == "uniform" else float(count) for client, count in counts.items()}
    total = sum(sizes.values())
    asked = {client: size / total for client, size in sizes.items() if size > 0}
    shares = cap_shares(asked, caps.max_share)
    notes = [
        f"client {client} says {examples[client]:,} examples; it counts for {count:,} (federation.max_examples)"
        for client, count in counts.items()
        if client not in caps.client_examples and count < examples[client] and weighting != "uniform"
    ]
    notes += [
        f"client {client} says {counts[client]:,} examples, {share:.1%} of the round; it counts for "
        f"{shares[client]:.1%} (federation.max_share is {caps.max_share:g})"
        for client, share in asked.items()
        if share > shares[client] + 1e-9  # more than rounding
    ]
    return shares, notes


def cap_shares(shares: Mapping[str, float], most: float) -> dict[str, float]:
    """Shares cut to `most`, or 1/K where that is more. The others get what is over, in proportion to their shares."""
    most = max(most, 1 / max(len(shares), 1))
    held = dict(shares)
    full: set[str] = set()
    while over := {client for client, share in held.items() if client not in full and share > most}:
        full |= over
        rest = sum(shares[client] for client in held if client not in full)
        left = max(1.0 - most * len(full), 0.0)
        held = {client: most if client in full else share / rest * left for client, share in shares.items()}
    return held


def find_outliers(norms: Mapping[str, float], caps: Caps) -> dict[str, str]:
    """Client → why its update is out of all proportion to the others of the round.

    The search repeats until no outlier is left, since a very large norm can hide a large one. Of an even number the
    larger middle norm is the median: as many tiny updates as honest ones then evict nobody. Where the median is zero,
    the updates of zeros are passed over, since every norm is out of proportion to zero.
    """
    left, found = dict(norms), {}
    while len(left) >= FEWEST:
        middle = statistics.median_high(left.values()) or positive_median(left)
        out = {client: norm for client, norm in left.items() if norm > caps.max_norm_ratio * middle}
        if not out:
            break
        for client, norm in out.items():
            del left[client]
            found[client] = (
                f"its update has norm {norm:.3g}, the round's median is {middle:.3g} (federation.max_norm_ratio is "
                f"{caps.max_norm_ratio:g})"
            )
    return found


def positive_median(norms: Mapping[str, float]) -> float:
    """The upper median of the norms that are not zero; infinity where all are."""
    return statistics.median_high([norm for norm in norms.values() if norm] or [math.inf])
