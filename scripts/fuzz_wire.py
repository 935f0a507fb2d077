"""Fuzz the reader of payloads: mutate, judge, keep what reaches new code.

    python scripts/fuzz_wire.py --count 1000000 --seed 0

Payloads are mutated in three places, always under a right checksum: anywhere, in the unpacked index, or in an unpacked
chunk. Every input must be refused with a WireError, or be a message that can be described and encoded again, within a
second and within the memory that the limits allow. One input in 16 runs under a line tracer; an input that reaches a
line of fedloom.wire for the first time, or is judged along a new path, joins the corpus. Prints one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path

import torch
import xxhash

import fedloom.wire
from fedloom.errors import WireError
from fedloom.tensors import to_dense
from fedloom.wire import Limits, Message, decode, describe, encode
from fedloom.wire.codec import open_payload
from fedloom.wire.fields import FieldWriter
from fedloom.wire.index import write_index
from fedloom.wire.streams import CHUNK, Stream, unpack

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "wire-v2"
SMALL = Limits(max_payload=2**18, max_values=2**16, max_tensors=64, max_bytes=2**20, max_index=2**16)
HEADROOM = 64 * 2**20  # what one input may allocate beyond what is held at the start
WIRE = str(Path(fedloom.wire.__file__).parent)
TRACE_EVERY = 16
INTERESTING = [bytes.fromhex(text) for text in ("00", "01", "7f", "ff", "8001", "ffff03", "ffffffff07", "8080808008")]


def sealed(body: bytes) -> bytes:
    return body + xxhash.xxh3_64_intdigest(body).to_bytes(8, "little")


def mutated(data: bytes, rng: random.Random, first: int = 0) -> bytes:
    """A few random edits: bits, bytes, numbers, cuts, repeats."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        at = rng.randrange(first, max(len(out), first + 1))
        edit = rng.randrange(6)
        if edit == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif edit == 1 and at < len(out):
            out[at] = rng.randrange(256)
        elif edit == 2:
            out[at : at + rng.randrange(4)] = rng.choice(INTERESTING)
        elif edit == 3:
            del out[at : at + rng.choice((1, 1, 2, 8))]
        elif edit == 4:
            out[at:at] = out[at : at + rng.choice((1, 2, 4, 16))]
        elif at < len(out):
            out[at] = (out[at] + rng.choice((-1, 1))) % 256
    return bytes(out)


def anywhere(payload: bytes, rng: random.Random) -> bytes:
    """The body mutated behind the version."""
    return sealed(mutated(payload[:-8], rng, first=5))


def in_index(payload: bytes, rng: random.Random) -> bytes:
    """The unpacked index mutated, and put back as it is."""
    opened = open_payload(payload, SMALL)
    index = mutated(write_index(opened.items, opened.streams), rng)
    return rebuilt(payload, opened.header_bytes, index, bytes(opened.coded))


def in_chunk(payload: bytes, rng: random.Random) -> bytes:
    """The content of one stream mutated, and stored as it is with its size in the index corrected."""
    opened = open_payload(payload, SMALL)
    if not opened.streams:
        return anywhere(payload, rng)
    chosen = rng.choice(opened.streams).role
    coded, streams, chunks = opened.coded, [], []
    for stream in opened.streams:
        own, coded = coded[: sum(stream.chunks)], coded[sum(stream.chunks) :]
        if stream.role == chosen and stream.size <= CHUNK:
            content = mutated(bytes(unpack(own, stream.size, "a chunk")), rng)[:CHUNK] or b"\x00"
            if rng.random() < 0.7:
                content = content[: stream.size].ljust(stream.size, b"\x01")
            streams.append(Stream(stream.role, len(content), (len(content),)))
            chunks.append(content)
        else:
            streams.append(stream)
            chunks.append(bytes(own))
    return rebuilt(payload, opened.header_bytes, write_index(opened.items, streams), b"".join(chunks))


def rebuilt(payload: bytes, header_bytes: int, index: bytes, chunks: bytes) -> bytes:
    out = FieldWriter()
    out.data += payload[:header_bytes]
    out.varint(len(index))
    out.counted(index)
    return sealed(bytes(out.data) + chunks)


def judge(payload: bytes) -> tuple[str, ...]:
    """The path of refusal, or ("read",) and the layout of what was read. Anything but a WireError escapes."""
    try:
        message = decode(payload, SMALL)
    except WireError as error:
        places, trace = [], error.__traceback__
        while trace:
            places.append(f"{Path(trace.tb_frame.f_code.co_filename).name}:{trace.tb_lineno}")
            trace = trace.tb_next
        return ("refused", *places[1:])
    description = describe(payload, SMALL)
    assert sum(description.parts.values()) == len(payload)
    for entry in message.entries.values():
        assert to_dense(entry).shape == torch.Size(entry.shape)
    again = decode(encode(Message(message.header, message.entries)), SMALL)
    assert list(again.entries) == list(message.entries)
    return ("read", *sorted(f"{t.form} {t.coding} {t.positions} {t.values.bit_length()}" for t in description.tensors))


def traced(payload: bytes, seen: set[tuple[str, int]]) -> tuple[tuple[str, ...], bool]:
    """Like `judge`; also whether a line of fedloom.wire was reached for the first time."""
    before = len(seen)

    def line(frame, event, argument):
        seen.add((frame.f_code.co_filename, frame.f_lineno))
        return line

    sys.settrace(lambda frame, event, argument: line if frame.f_code.co_filename.startswith(WIRE) else None)
    try:
        outcome = judge(payload)
    finally:
        sys.settrace(None)
    return outcome, len(seen) > before


def fuzz(count: int, seed: int) -> dict[str, object]:
    rng = random.Random(seed)
    corpus = [bytes.fromhex(path.read_text()) for path in sorted(GOLDEN.glob("*.hex"))]
    outcomes: Counter[str] = Counter()
    paths: set[tuple[str, ...]] = set()
    lines: set[tuple[str, int]] = set()
    slowest, begun = 0.0, time.perf_counter()
    for number in range(count):
        parent = rng.choice(corpus)
        try:
            payload = rng.choice((anywhere, in_index, in_chunk))(parent, rng)
        except WireError:  # a parent that is itself refused cannot be opened
            payload = anywhere(parent, rng)
        start = time.process_time()  # of this process: a busy machine is no hang
        try:
            path, fresh = traced(payload, lines) if number % TRACE_EVERY == 0 else (judge(payload), False)
        except BaseException:
            print(f"input {number} of seed {seed}: {payload.hex()}", file=sys.stderr)
            raise
        taken = time.process_time() - start
        slowest = max(slowest, taken)
        if taken > 1.0:
            raise SystemExit(f"input {number} of seed {seed} took {taken:.1f} s: {payload.hex()}")
        outcomes[path[0]] += 1
        if (fresh or path not in paths) and len(payload) < 4096:
            corpus.append(payload)
        paths.add(path)
    return {
        "payloads": count,
        "seed": seed,
        **outcomes,
        "paths": len(paths),
        "lines": len(lines),
        "corpus": len(corpus),
        "slowest_s": round(slowest, 3),
        "seconds": round(time.perf_counter() - begun, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1_000_000, help="payloads to judge")
    parser.add_argument("--seed", type=int, default=0, help="seed of all mutations")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    fuzz(50, 0)  # loads whatever is loaded late
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + HEADROOM, held + HEADROOM))
    print(json.dumps(fuzz(arguments.count, arguments.seed)))


if __name__ == "__main__":
    main()
