"""Two trees of the code against each other: `python scripts/compare_trees.py OLD NEW`, folders of two checkouts.

CPU seconds of one thread for the turns of four clients, the server's turn, and decoding and encoding the updates, on
an adapter of 0.9 million values. The trees take turns, and the least of all repeats counts. Prints new over old, and
the bytes of the updates. OLD may have the layout of before 2026-11-28.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

CHILD = """
import json, sys, time
import torch
torch.set_num_threads(1)
try:
    from fedloom.compress.quantize import quantize as rounding
    from fedloom.lora.pair import LoraPair, LoraState, initial_state
    from fedloom.methods.table import build
    from fedloom.rounds.job import Job
    from fedloom.rounds.step import Trained
    from fedloom.rounds.turns import client_turn, server_turn, start
except ImportError:
    from fedloom.lora import LoraPair, LoraState, initial_state
    from fedloom.methods import build
    from fedloom.rounds import Job, Trained, client_turn, server_turn, start
    from fedloom.wire import quantize
    rounding = lambda kind: lambda values, seed: quantize(values, kind, seed)
from fedloom.wire import decode, encode
KINDS = {"q": (1024, 1024), "k": (256, 1024), "down": (1024, 2816)}
SHAPES = {f"layers.{i}.{name}": shape for i in range(4) for name, shape in KINDS.items()}
RANKS = dict.fromkeys(SHAPES, 32)
METHODS = {"fedsrd": "int4", "fedsrd-e": "int4", "florist": "int8", "loom": "sign", "fedit": "int8", "fed-dare": "int8"}
def trained(state, seed):
    draw = torch.Generator().manual_seed(seed)
    moved = lambda tensor: tensor + 0.01 * torch.randn(tensor.shape, generator=draw)
    return LoraState({module: LoraPair(moved(pair.A), moved(pair.B)) for module, pair in state.items()})
def timed(call):
    began = time.process_time()
    result = call()
    return time.process_time() - began, result
rows = {}
for name, kind in METHODS.items():
    job = Job(build(name), 3, rounding(kind))
    first = initial_state(SHAPES, RANKS, 1)
    server, after = start(job, first), {f"c{k}": trained(first, k) for k in range(4)}
    def clients():
        return {
            client: client_turn(
                job, client, start(job, first, RANKS), [], lambda *_, a=adapter: Trained(a, 100, 1.0, 1), 1
            ).payload
            for client, adapter in after.items()
        }
    seconds = []
    for _ in range(4):
        client_s, sent = timed(clients)
        server_s, _ = timed(lambda: server_turn(job, server, sent, 1))
        decode_s, messages = timed(lambda: [decode(payload) for payload in sent.values()])
        encode_s, _ = timed(lambda: [encode(message) for message in messages])
        seconds.append([client_s, server_s, decode_s, encode_s])
    rows[name] = {"seconds": [min(column) for column in zip(*seconds)], "bytes": sum(map(len, sent.values()))}
print(json.dumps(rows))
"""


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    reader.add_argument("old", type=Path)
    reader.add_argument("new", type=Path)
    reader.add_argument("--repeats", type=int, default=3)
    given = reader.parse_args()
    runs = [[measure(tree) for tree in (given.old, given.new)] for _ in range(given.repeats)]
    print("| method | client turns | server turn | decode | encode | bytes, old | bytes, new |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for method in runs[0][0]:
        least = [[min(run[tree][method]["seconds"][at] for run in runs) for at in range(4)] for tree in (0, 1)]
        ratios = " | ".join(f"{new / old:.2f}" for old, new in zip(*least, strict=True))
        print(f"| {method} | {ratios} | {runs[0][0][method]['bytes']:,} | {runs[0][1][method]['bytes']:,} |")


def measure(tree: Path) -> dict:
    environment = {"PYTHONPATH": str((tree / "src").absolute()), "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
