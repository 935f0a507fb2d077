"""A secure sum of many sites of which some vanish: whether it is exact, processor time, and bytes beside the vector."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from rich.table import Table

from fedloom.secagg import Collector, Member, Session, least_threshold
from fedloom.secagg.masks import packed_size

Result = TypeVar("Result")


@dataclass(eq=False, slots=True)
class Spent:
    """Seconds of the processor and bytes of one party."""

    cpu_s: float = 0.0
    up_bytes: int = 0
    down_bytes: int = 0

    def timed(self, call: Callable[[], Result]) -> Result:
        """What the call returns; its time counts."""
        began = time.process_time()
        result = call()
        self.cpu_s += time.process_time() - began
        return result


@dataclass(frozen=True, slots=True)
class Step:
    """One phase: what a site is told, what it says to that, and who takes it."""

    phase: str
    told: Callable[[Collector, str], bytes]
    said: Callable[[Member, bytes, Any], bytes]
    taken: Callable[[Collector, str, bytes], None]


STEPS = (
    Step("keys", lambda _, name: b"", lambda member, told, vector: member.announce(), Collector.take_announced),
    Step("shares", lambda c, _: c.announced(), lambda member, told, _: member.share(told), Collector.take_shares),
    Step("masked", Collector.sealed_for, Member.mask, Collector.take_masked),
    Step("agreement", lambda c, _: c.present(), lambda member, told, _: member.agree(told), Collector.take_agreed),
    Step("opening", lambda c, _: c.agreed(), lambda member, told, _: member.open(told), Collector.take_opened),
)


def run(sites: int = 20, vanish: int = 5, values: int = 100_000, bits: int = 16, seed: int = 0) -> dict[str, Any]:
    """{"rows": [one for each phase in which the sites vanish]}; the site with most of each number stands for all.

    overhead_bytes: all that a site sends and receives but its vector, which takes values × bits / 8 either way.
    """
    return {"rows": [play(step.phase, sites, vanish, values, bits, seed) for step in STEPS]}


def play(phase: str, sites: int, vanish: int, values: int, bits: int, seed: int) -> dict[str, Any]:
    """One sum whose last `vanish` sites are silent from this phase on."""
    names = tuple(f"site{number:04}" for number in range(sites))
    session = Session("bench", 1, secrets.token_bytes(16), names, least_threshold(sites), values, bits)
    identities = {name: Ed25519PrivateKey.generate() for name in names}
    roster = {name: key.public_key() for name, key in identities.items()}
    draw = np.random.default_rng(seed)
    vectors = {name: draw.integers(0, 2**bits, values, dtype=np.uint32) for name in names}
    server, spent = Spent(), {name: Spent() for name in names}
    collector = Collector(session, roster)
    members = {name: spent[name].timed(partial(Member, session, name, identities[name], roster)) for name in names}
    there = names
    for step in STEPS:
        there = there[: sites - vanish] if step.phase == phase else there
        said = {}
        for name in there:
            told = server.timed(partial(step.told, collector, name))
            said[name] = spent[name].timed(partial(step.said, members[name], told, vectors[name]))
            spent[name].down_bytes += len(told)
            spent[name].up_bytes += len(said[name])
        for name, message in said.items():
            server.timed(partial(step.taken, collector, name, message))
    total, summed, _ = server.timed(collector.total)
    expected = sum(vectors[name].astype(np.uint64) for name in summed) & np.uint64(2**bits - 1)
    vector = packed_size(values, bits)
    return {
        "vanish_at": phase,
        "sites": sites,
        "vanish": vanish,
        "values": values,
        "bits": bits,
        "exact": bool((total == expected).all()),
        "summed": len(summed),
        "site_cpu_s": max(one.cpu_s for one in spent.values()),
        "server_cpu_s": server.cpu_s,
        "vector_bytes": vector,
        "overhead_bytes": max(spent[name].up_bytes + spent[name].down_bytes - vector for name in there),
    }


def tables(result: Mapping[str, Any]) -> Iterator[Table]:
    """A row for each phase."""
    first = result["rows"][0]
    title = f"a secure sum of {first['sites']} sites, {first['values']:,} values of {first['bits']} bits"
    table = Table(title=f"{title}; {first['vanish']} vanish")
    for column in ("from phase", "exact", "summed", "site CPU s", "server CPU s", "vector bytes", "bytes beside it"):
        table.add_column(column, justify="left" if column == "from phase" else "right")
    for row in result["rows"]:
        times = (f"{row['site_cpu_s']:.3f}", f"{row['server_cpu_s']:.3f}")
        sizes = (f"{row['vector_bytes']:,}", f"{row['overhead_bytes']:,}")
        table.add_row(row["vanish_at"], "yes" if row["exact"] else "no", str(row["summed"]), *times, *sizes)
    yield table
