"""Fuzz whole rounds: one of three clients sends a well-formed payload that means harm.

    python tests/attacks/fuzz_rounds.py --count 100000 --seed 0

Every method, first rounds and later ones, clients of unequal ranks where a method takes them, ranks announced to the
server or not, with the usual caps and without any. The update of one client is changed in its shapes, ranks, values,
forms, names or header, or is another client's, always under a right checksum. The round must end, the server's state
must be finite, another client must be able to take it up, and no honest client may be refused. Runs in bounded memory,
so that a payload that asks for more fails. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from fedloom.compress.entries import Dense, Entry, Quantized, Seeded, Sparse, count, to_dense
from fedloom.errors import FedloomError
from fedloom.methods.table import METHODS, build
from fedloom.rounds.caps import USUAL, Caps
from fedloom.rounds.checks import UpdateFacts, check_finite, check_update
from fedloom.rounds.job import Job, sender_digest
from fedloom.rounds.turns import accept, client_turn, narrow_broadcast, server_turn
from fedloom.wire import Header, Message, decode, encode
from toy import Federation, job

MEMORY = 3 * 2**30
HEADROOM = 2**29
ROUNDS = (1, 2, 4)
NUMBERS = (math.nan, math.inf, -math.inf, 1e30, 3.4e38, -1e30, 1e18, 1e6, 1e4, 1e-45, -0.0, 0.0, 1.0)
EXAMPLES = (0, 1, 7, 10**9, 10**9 + 1, 2**31, 2**62)
SIZES = (0, 1, 2, 3, 5, 8, 64, 4096, 2**16, 2**30)

Entries = dict[str, Entry]
Edit = Callable[[Header, Entries, random.Random], tuple[Header, Entries]]


@dataclass(frozen=True)
class Scene:
    """A round that is about to be combined: the server's state, what its clients have sent, and who they are."""

    name: str
    job: Job
    federation: Federation
    round: int
    payloads: Mapping[str, bytes]
    seen: Mapping[str, UpdateFacts]


def scenes() -> list[Scene]:
    """Rounds 1, 2 and 4 of every method, without the server's turn."""
    found = []
    for name in METHODS:
        method = build(name)
        casts = [dict.fromkeys(("ada", "bob", "cyd"), 4)]
        casts += [{"ada": 4, "bob": 2, "cyd": 1}] if method.facts.unequal_ranks else []
        for cast in casts:
            for round in ROUNDS:
                federation = Federation(job(method), cast)
                for _ in range(round - 1):
                    federation.play()
                federation.settle()
                payloads = {
                    client: client_turn(federation.job, client, state, [], federation.training(client), round).payload
                    for client, state in federation.clients.items()
                }
                for caps, ranks in ((USUAL, federation.ranks), (USUAL, {}), (Caps(), federation.ranks), (Caps(), {})):
                    run = replace(federation.job, caps=caps, ranks=ranks)
                    seen = {c: check_update(run, federation.server, c, p, round) for c, p in payloads.items()}
                    found.append(Scene(name, run, federation, round, payloads, seen))
    return found


def one(entries: Entries, rng: random.Random) -> str:
    return rng.choice(sorted(entries))


def reshaped(header: Header, entries: Entries, rng: random.Random) -> tuple[Header, Entries]:
    """Other dimensions: none, one, three, swapped, or any two."""
    name = one(entries, rng)
    shape = entries[name].shape
    sizes = [rng.choice((*shape, *SIZES)) for _ in range(3)]
    shape = rng.choice(((), shape[:1], shape[::-1], tuple(sizes[:2]), tuple(sizes), (*shape, 1), (0, *shape[1:])))
    return header, entries | {name: filled(shape, rng)}


def reranked(header: Header, entries: Entries, rng: random.Random) -> tuple[Header, Entries]:
    """Another rank of one factor, of both, or of all."""
    module = one(entries, rng).rpartition("/")[0]
    rank, both = rng.choice((0, 1, 2, 3, 5, 64)), rng.random() < 0.7
    changed = dict(entries)
    for name, entry in entries.items():
        own, _, part = name.rpartition("/")
        if (own == module or rng.random() < 0.2) and len(entry.shape) == 2 and (both or rng.random() < 0.5):
            shape = {"A": (rank, entry.shape[1]), "B": (entry.shape[0], rank)}.get(part, (rank, rank))
            changed[name] = filled(shape, rng)
    return header, changed


def filled(shape: tuple[int, ...], rng: random.Random) -> Entry:
    """Random values; of a large tensor none, so that the attack costs the attacker nothing."""
    if count(shape) > 2**14:
        return Sparse(shape, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    return Dense(shape, 0.1 * torch.randn(count(shape), generator=generator))


def spoilt(header: Header, entries: Entries, rng: random.Random) -> tuple[Header, Entries]:
    """Values that are not finite, huge or tiny: all of one tensor, of all, or one element."""
    number, chosen, single = rng.choice(NUMBERS), one(entries, rng), rng.random() < 0.3
    changed = dict(entries)
    for name in entries if rng.random() < 0.5 else [chosen]:
        tensor = to_dense(entries[name]).clone()
        if single and tensor.numel():
            tensor.view(-1)[rng.randrange(tensor.numel())] = number
        else:
            tensor.fill_(number)
        changed[name] = Dense(tuple(tensor.shape), tensor.reshape(-1))
    return header, changed


def scaled(header: Header, entries: Entries, rng: random.Random) -> tuple[Header, Entries]:
    """The same direction, of another size."""
    factor = 10.0 ** rng.uniform(-40, 36)
    return header, {n: Dense(e.shape, (to_dense(e).reshape(-1) * factor)) for n, e in entries.items()}


def collapsed(header: Header, entries: Entries, rng: random.Random) -> tuple[Header, Entries]:
    """Factors whose rows or columns are all the same, so that nothing can be inverted."""
    return header, {n: Dense(e.shape, to_dense(e).mean().repeat(count(e.shape))) for n, e in entries.items()}


def recoded(header: Header, entries: Entries, rng: random.Random) -> tuple[Header, Entries]:
    """Another form: sparse, seeded, integers of any scale, half precision."""
    name = one(entries, rng)
    shape, total = entries[name].shape, count(entries[name].shape)
    values = torch.randn(total, generator=torch.Generator().manual_seed(rng.randrange(2**31)))
    kept = sorted(rng.sample(range(total), rng.randrange(total + 1)))
    bits = rng.choice((8, 4, 1))
    codes = torch.where(values > 0, 1, -1).to(torch.int8) * (1 if bits == 1 else 7)
    scale = torch.tensor([rng.choice((0.0, 1e-3, 1.0, 1e30, 3e38, math.inf, math.nan))])
    threshold, seed = rng.choice((0, 1, 2**15, 2**16)), rng.randrange(2**63)
    form = rng.randrange(5)
    if form == 0:
        return header, entries | {name: Sparse(shape, torch.tensor(kept, dtype=torch.int64), values[: len(kept)])}
    if form == 1:
        return header, entries | {name: Dense(shape, Quantized(codes, scale, max(total, 1), bits))}
    if form == 2:
        return header, entries | {name: Dense(shape, values.to(rng.choice((torch.bfloat16, torch.float16))))}
    if form == 3:
        return header, entries | {name: Seeded(shape, seed, threshold / 2**16, values)}
    return header, {n: Sparse(e.shape, torch.zeros(0, dtype=torch.int64), torch.zeros(0)) for n, e in entries.items()}


def renamed(header: Header, entries: Entries, rng: random.Random) -> tuple[Header, Entries]:
    """Swapped, missing, further or foreign tensors."""
    first, second = one(entries, rng), one(entries, rng)
    module, _, part = first.rpartition("/")
    other = rng.choice(("A", "B", "R", "frozen_A", "frozen_B", "", "A/B"))
    choices: list[Entries] = [
        entries | {first: entries[second], second: entries[first]},
        {name: entry for name, entry in entries.items() if name != first},
        {name: entry for name, entry in entries.items() if name.rpartition("/")[0] == module},
        {name: entry for name, entry in entries.items() if name.rpartition("/")[0] != module},
        {name: entry for name, entry in entries.items() if name.rpartition("/")[2] != part},
        entries | {f"{module}/{other}": entries[second]},
        entries | {f"{module}.\x1b[2J/{part}": entries[first]},
        {f"x.{name}": entry for name, entry in entries.items()},
        {},
    ]
    return header, rng.choice(choices)


def headed(header: Header, entries: Entries, rng: random.Random) -> tuple[Header, Entries]:
    """Another header."""
    digest = "".join(rng.choice("0123456789abcdef") for _ in range(32))
    return rng.choice(
        (
            replace(header, kind=rng.choice(("change", "state"))),
            replace(header, method=rng.choice(sorted(METHODS))),
            replace(header, round=rng.choice((0, header.round + 1, 2**62))),
            replace(header, base_version=rng.choice((0, header.base_version + 1, 2**62))),
            replace(header, base_digest=rng.choice(("", digest))),
            replace(header, result_digest=rng.choice(("", digest))),
            *(replace(header, num_examples=number) for number in EXAMPLES),
        )
    ), entries


EDITS: tuple[Edit, ...] = (reshaped, reranked, spoilt, scaled, collapsed, recoded, renamed, headed)


def forged(scene: Scene, liar: str, rng: random.Random) -> tuple[str, bytes] | None:
    """(what was done, the liar's payload); None where no encoder writes such a thing."""
    if rng.random() < 0.03:
        other = rng.choice([client for client in scene.payloads if client != liar])
        message = decode(scene.payloads[other])
        sender = sender_digest(liar, message.header.base_digest, scene.round)
        header = replace(message.header, result_digest=sender)
        return "copied", rng.choice((scene.payloads[other], encode(Message(header, message.entries))))
    message = decode(scene.payloads[liar])
    header, entries, done = message.header, dict(message.entries), []
    try:
        for edit in rng.choices(EDITS, k=rng.choice((1, 1, 1, 2, 3))):
            if entries and all(count(entry.shape) <= 2**14 for entry in entries.values()):
                header, entries = edit(header, entries, rng)
                done.append(edit.__name__)
        return "+".join(sorted(set(done))), encode(Message(header, entries))
    except (FedloomError, RuntimeError):  # such as a sparse entry whose values are too few, or factors of no size
        return None


def play(scene: Scene, liar: str, payload: bytes, outcomes: Counter[str], *, apply: bool) -> None:
    """The round with this payload, and what must hold of it."""
    server, honest = scene.federation.server, {c: s for c, s in scene.seen.items() if c != liar}
    turn = server_turn(scene.job, server, {**scene.payloads, liar: payload}, scene.round, seen=honest)
    assert set(turn.refused) <= {liar}, f"honest clients were refused: {turn.refused}"
    check_finite(turn.state)
    assert turn.state.version == server.version + 1
    reason = turn.refused.get(liar, "")
    outcomes["failed" if "the round fails" in reason else "refused" if reason else "averaged"] += 1
    if apply:
        for client, state in scene.federation.clients.items():
            ranks = scene.federation.ranks[client]
            accept(scene.job, state, narrow_broadcast(scene.job, turn.payload, ranks))


def fuzz(count: int, seed: int, given: list[Scene] | None = None) -> dict[str, object]:
    rng = random.Random(seed)
    stage = given or scenes()
    outcomes: Counter[str] = Counter()
    slowest, begun, number = 0.0, time.process_time(), 0
    while number < count:
        scene = rng.choice(stage)
        liar = rng.choice(sorted(scene.payloads))
        made = forged(scene, liar, rng)
        if made is None:
            continue
        what, payload = made
        start = time.process_time()  # of this process: a busy machine is no hang
        try:
            play(scene, liar, payload, outcomes, apply=number % 32 == 0)
        except BaseException:
            print(f"reply {number} of seed {seed}: {scene.name}, round {scene.round}, {liar} {what}", file=sys.stderr)
            print(payload.hex()[:2000], file=sys.stderr)
            raise
        taken = time.process_time() - start
        slowest = max(slowest, taken)
        if taken > 5.0:
            raise SystemExit(f"reply {number} of seed {seed} took {taken:.1f} s: {scene.name}, {what}")
        number += 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        "rounds": count,
        "seed": seed,
        **outcomes,
        "methods": len({scene.name for scene in stage}),
        "scenes": len(stage),
        "slowest_s": round(slowest, 3),
        "peak_mib": round(peak),
        "cpu_s": round(time.process_time() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=100_000, help="rounds to play")
    parser.add_argument("--seed", type=int, default=0, help="seed of all mutations")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stage = scenes()
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limit = max(MEMORY, held + HEADROOM)  # some builds of torch take most of 3 GiB of addresses by themselves
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print(json.dumps(fuzz(arguments.count, arguments.seed, stage)))


if __name__ == "__main__":
    main()
