"""Fuzz the reader of payloads: mutate, judge, keep what reaches new code.

    python scripts/fuzz_wire.py --count 1000000 --seed 0

Payloads are mutated in fifteen ways (`wire_mutations.py`), always under a right checksum, and read under the default
limits or under small ones. Every input must be refused with a WireError, or be a message that can be described and
encoded again to the same message and the same bytes, within a second of CPU time. The whole process runs under a limit
of memory. One input in 64 runs under a line tracer; an input that reaches a line of fedloom.wire for the first time, or
is judged along a new path, joins the corpus. Prints one line of JSON; ends with an error at the first input that fails.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter
from dataclasses import fields, is_dataclass
from pathlib import Path

import torch
from torch import Tensor
from wire_mutations import KINDS, OF_BYTES, Parent, opened

import fedloom.wire
from fedloom.compress.entries import Dense, count, to_dense
from fedloom.compress.quantize import quantize
from fedloom.errors import WireError
from fedloom.wire import DEFAULT, Header, Limits, Message, decode, describe, encode, read_header
from fedloom.wire.streams import CHUNK

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "wire-v2"
SMALL = Limits(max_payload=2**18, max_values=2**16, max_tensors=64, max_bytes=2**20, max_index=2**16, max_drawn=2**16)
MOST_SECONDS = 1.0
"""CPU time of one input: reading, and for what is read describing, encoding and reading again."""
WIRE = str(Path(fedloom.wire.__file__).parent)
TRACE_EVERY = 64
Pools = tuple[list[Parent], list[Parent], list[Parent]]
"""The corpus: what was accepted, what could be opened, and what could not."""
DENSE_UP_TO = 2**20  # elements of a tensor that is made dense, which is the receiver's decision and cost


def corpus() -> list[Parent]:
    """The golden payloads, and one whose stream ends a byte beyond a chunk."""
    payloads = [bytes.fromhex(path.read_text()) for path in sorted(GOLDEN.glob("*.hex"))]
    beyond = Dense((CHUNK + 1,), quantize("int8")(torch.zeros(CHUNK + 1), 0))
    payloads.append(encode(Message(Header("state", "fedit", 1, 0, ""), {"m/A": beyond})))
    return [opened(payload) for payload in payloads]


def content(part: object) -> object:
    """A message's entries down to their bits, to be compared."""
    if isinstance(part, Tensor):
        return part.dtype, part.contiguous().view(torch.uint8).numpy().tobytes()
    if is_dataclass(part):
        return type(part), *(content(getattr(part, field.name)) for field in fields(part))
    return part


def judge(payload: bytes, limits: Limits) -> tuple[str, ...]:
    """The path of refusal, or ("accepted",) and the layout of what was read. Anything but a WireError escapes."""
    try:
        message = decode(payload, limits)
    except WireError as error:
        places, trace = [], error.__traceback__
        while trace:
            places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
            trace = trace.tb_next
        return ("refused", *places[1:])
    assert read_header(payload, limits) == message.header
    description = describe(payload, limits)
    assert sum(description.parts.values()) == len(payload)
    for entry in message.entries.values():
        if count(entry.shape) <= DENSE_UP_TO:
            assert to_dense(entry).shape == torch.Size(entry.shape)
    again = encode(message)
    read = decode(again)
    assert read.header == message.header and list(read.entries) == list(message.entries)
    assert all(content(entry) == content(message.entries[name]) for name, entry in read.entries.items())
    assert encode(read) == again
    return ("accepted", *sorted({f"{t.form} {t.coding} {t.positions}" for t in description.tensors}))


def traced(payload: bytes, limits: Limits, seen: set[tuple[str, int]]) -> tuple[tuple[str, ...], bool]:
    """Like `judge`; also whether a line of fedloom.wire was reached for the first time."""
    before = len(seen)

    def line(frame, event, argument):
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename.startswith(WIRE) else None)
    try:
        outcome = judge(payload, limits)
    finally:
        sys.settrace(None)
    return outcome, len(seen) > before


def mutate(pools: Pools, rng: random.Random) -> tuple[str, bytes]:
    """A kind of mutation and a payload of it, mostly of a parent that was accepted."""
    kind = rng.choice(list(KINDS))
    # Of parents that cannot be opened only bytes can be changed.
    usable = [pool for pool in pools if pool and (kind in OF_BYTES or pool[0].head)]
    parent = rng.choice(usable[0] if rng.random() < 0.7 else rng.choice(usable))
    other = rng.choice(pools[0])
    try:
        return kind, KINDS[kind](parent, other, rng)
    except (WireError, OverflowError):  # a number that cannot even be written, or a chunk that was spoilt before
        return "flips", KINDS["flips"](parent, other, rng)


def fuzz(number_of: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    pools: Pools = (corpus(), [], [])
    made: Counter[str] = Counter()
    accepted: Counter[str] = Counter()
    paths: set[tuple[str, ...]] = set()
    lines: set[tuple[str, int]] = set()
    slowest, begun, worked = 0.0, time.perf_counter(), time.process_time()
    for number in range(number_of):
        kind, payload = mutate(pools, rng)
        limits = rng.choice((DEFAULT, SMALL))
        start = time.process_time()  # of this process: a busy machine is no hang
        try:
            trace = number % TRACE_EVERY == 0
            path, fresh = traced(payload, limits, lines) if trace else (judge(payload, limits), False)
        except BaseException:
            print(f"input {number} of seed {seed} ({kind}): {payload.hex()}", file=sys.stderr)
            raise
        taken = time.process_time() - start
        slowest = max(slowest, taken)
        if taken > MOST_SECONDS:
            raise SystemExit(f"input {number} of seed {seed} ({kind}) took {taken:.1f} s: {payload.hex()}")
        made[kind] += 1
        accepted[kind] += path[0] == "accepted"
        if (fresh or path not in paths) and len(payload) < 4096:
            parent = opened(payload)
            pools[0 if path[0] == "accepted" else 1 if parent.head else 2].append(parent)
        paths.add(path)
    return {
        "payloads": number_of,
        "seed": seed,
        "refused": number_of - accepted.total(),
        "accepted": accepted.total(),
        "kinds": {kind: [made[kind], accepted[kind]] for kind in KINDS},
        "paths": len(paths),
        "lines": len(lines),
        "corpus": sum(map(len, pools)),
        "slowest_s": round(slowest, 3),
        "seconds": round(time.perf_counter() - begun, 1),
        "cpu_seconds": round(time.process_time() - worked, 1),
    }


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="payloads to judge")
    parser.add_argument("--seed", type=int, default=0, help="seed of all mutations")
    parser.add_argument("--memory", type=int, default=3072, help="MiB of address space for the whole process")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fuzz(50, 0)  # loads whatever is loaded late
    resource.setrlimit(resource.RLIMIT_AS, (arguments.memory * 2**20, arguments.memory * 2**20))
    before = peak_mib()
    result = fuzz(arguments.count, arguments.seed)
    peak = peak_mib()
    memory = {"allowed_mib": arguments.memory, "peak_mib": round(peak), "growth_mib": round(peak - before, 1)}
    print(json.dumps({**result, **memory}))


if __name__ == "__main__":
    main()
