"""Mutated jobs at a desk: it always answers, its policy is never passed over, refused jobs leave nothing on disk.

The desk is a real one with a tiny model, under a limit on its memory and on the processor time of a request. Mutated
are settings (extreme numbers, patterns, long lists, unknown keys, wrong types, other methods and ranks, raw text),
requests (order, rounds, base, job) and payloads (replayed, cut, of other kinds, shapes and modules). What the policy
allows is worked out a second time here, in another way, for everything that was trained.

    python tests/attacks/fuzz_jobs.py --count 10000
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import random
import resource
import signal
import sys
import tempfile
import time
import tomllib
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import tomli_w
import torch

import tiny_models
from fedloom.compress.entries import Dense, Sparse, dense_entry
from fedloom.lora.pair import LoraPair
from fedloom.model.base import quiet_transformers
from fedloom.model.identity import base_digest
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy
from fedloom.wire import Header, Message, decode, encode

MEMORY = 6 * 2**30
"""Address space, of which the libraries take more than half without using it."""
SECONDS = 30
"""Processor time of a request, at most: a turn takes well under one."""
SECRET = "patient 4711"
POLICY = Policy(
    methods=("fedit", "fedsrd", "fed-sb"),
    modules=("q_proj", "k_proj", "v_proj"),
    min_examples=20,
    min_examples_update=4,
    max_rank=8,
    max_steps=3,
    max_batch=8,
    min_length=64,
    max_length=128,
    optimizers=("adamw_torch", "sgd"),
    min_learning_rate=1e-6,
    max_learning_rate=0.1,
    max_seconds_round=20.0,
    max_bytes_round="256KB",
    max_disk="64MiB",
)
SETTINGS = {
    "federation": {"participants": ["bank", "lab"], "num_rounds": 3, "seed": 1},
    "lora": {"r": 4, "lora_alpha": 8.0, "target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    "training": {"max_steps": 1, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "optim": "adamw_torch"},
    "method": {"name": "fedit"},
    "data": {"template": "plain", "max_length": 96},
    "model": {"threads": 1},
    "clients": {"bank": {"r": 4}},
}
KEYS = [
    *("model.threads", "model.dtype", "model.quantization", "model.path", "model.adapter", "model.device"),
    *("lora.r", "lora.lora_alpha", "lora.target_modules", "lora.rank_pattern", "lora.alpha_pattern"),
    *("lora.lora_dropout", "lora.use_rslora"),
    *("data.source", "data.template", "data.max_length", "data.partitioner", "data.heldout"),
    *("data.packing", "data.assistant_only_loss", "data.completion_only_loss"),
    *("federation.num_rounds", "federation.num_clients", "federation.participants", "federation.seed"),
    *("federation.weighting", "federation.consolidate_every", "federation.fraction_train"),
    *("training.learning_rate", "training.max_steps", "training.per_device_train_batch_size", "training.optim"),
    *("training.gradient_accumulation_steps", "training.warmup_steps", "training.warmup_ratio", "training.bf16"),
    *("training.lr_scheduler_type", "training.weight_decay", "training.max_grad_norm"),
    *("method.name", "method.preset", "method.density", "method.ridge", "wire.values", "wire.budget"),
    *("clients.lab.r", "clients.bank.r", "clients.lab.rank_pattern", "clients.bank.alpha_pattern"),
    *("clients.lab.target_modules", "clients.nobody.r", "nothing.at_all", "lora.rr", "flower", "output.dir"),
]
BOMBS = ["(([a-z]|[a-z]*[a-z_.0-9])*)*X", "(.*)*(.*)*(.*)*X", "(" * 90, "[a-", "q_proj", "*", "", "\x1b]0;x\x07"]
FORGED = "x\n2026-01-01 00:00:00 INFO round 7 answered"


def odd_value(draw: random.Random) -> object:
    """A value of any kind, mostly one that no setting should have."""
    kinds = (
        lambda: draw.choice([0, -1, 1, 2, 3, 5, 9, 64, 10**6, 10**9, 10**12, 2**63, 2**64, 10**30, 10**300]),
        lambda: draw.choice([0.0, -1.0, 1e-300, 1e-9, 0.5, 0.999, 2.5, 1e9, 1e300, float("inf"), float("nan")]),
        lambda: draw.choice([True, False]),
        lambda: draw.choice(["", "x", FORGED, "fedit", "flora", "hetlora", "sgd", "lab", "../../etc", "\x1b[2K"]),
        lambda: "long" * draw.choice([100, 10_000]),
        lambda: draw.choice(BOMBS),
        lambda: [odd_value(draw) for _ in range(draw.choice([0, 1, 3]))],
        lambda: ["lab"] * draw.choice([2, 9_000, 30_000]),
        lambda: {draw.choice(BOMBS): draw.choice([1, 4, 9, -1, 10**9]) for _ in range(draw.choice([1, 2]))},
        lambda: {f"layer{number}": 4 for number in range(draw.choice([3, 2_000, 9_000]))},
        lambda: {"deep": {"deeper": {"deepest": 1}}},
    )
    return draw.choice(kinds)()


def mutated_settings(draw: random.Random) -> str:
    """Settings as TOML with one to three mutations, now and then in the text itself."""
    tree = json.loads(json.dumps(SETTINGS))
    for _ in range(draw.choice([1, 1, 2, 3])):
        *path, last = draw.choice(KEYS).split(".")
        table = tree
        for name in path:
            table = table.setdefault(name, {}) if isinstance(table.get(name, {}), dict) else {}
        table[last] = odd_value(draw)
    text = tomli_w.dumps(tree)
    if draw.random() < 0.1:
        place, odd = draw.randrange(len(text)), ["[", '"', "\n[lora]\n", "= 9", "[[[[" * 500, "\x00", "1" * 6000]
        text = text[:place] + draw.choice(odd) + text[place:]
    return text


def breaks_policy(text: str, round: int) -> str:
    """Why these settings may not be trained here, worked out from the text alone; "" where they may."""
    tree = tomllib.loads(text)
    lora, training = tree.get("lora", {}), tree.get("training", {})
    own = {**lora, **tree.get("clients", {}).get("lab", {})}
    ranks = [table.get("r", 4) for table in (lora, *tree.get("clients", {}).values())]
    for table in (lora, *tree.get("clients", {}).values()):
        ranks += table.get("rank_pattern", {}).values()
    steps, batch = training.get("max_steps", 10), training.get("per_device_train_batch_size", 8)
    accumulated = training.get("gradient_accumulation_steps", 1)
    rules = {
        "method": tree.get("method", {}).get("name", "fedsrd") in POLICY.methods,
        "modules": own.get("target_modules", "all-linear") != "all-linear"
        and {name.rpartition(".")[2] for name in own["target_modules"]} <= set(POLICY.modules),
        "rank": max(ranks) <= 8,
        "steps": steps <= 3,
        "batch": batch <= 8,
        "examples": steps * batch * accumulated >= 4,
        "length": 64 <= tree.get("data", {}).get("max_length", 512) <= 128,
        "optimizer": training.get("optim", "adamw_torch") in POLICY.optimizers,
        "rate": 1e-6 <= training.get("learning_rate", 2e-4) <= 0.1,
        "round": 1 <= round <= tree.get("federation", {}).get("num_rounds", 20),
    }
    return ", ".join(name for name, kept in rules.items() if not kept)


def odd_payload(draw: random.Random, desk: Desk, sent: list[bytes]) -> bytes:
    """A payload that is wrong in one way, or right in all but the moment."""
    held = desk.held
    if held is None or draw.random() < 0.1:
        return draw.choice([b"", b"FLOM", draw.randbytes(200)])
    if sent and draw.random() < 0.3:
        payload = draw.choice(sent)
        return payload if draw.random() < 0.5 else payload[: draw.randrange(len(payload))]
    state = held.after
    tensors = {name: dense_entry(tensor) for name, tensor in state.adapter.tensors().items()}
    kind = draw.choice(["state", "state", "change", "update"])
    name = min(tensors)
    change = draw.choice(
        ["none", "drop", "foreign", "nan", "huge", "wide", "vast", "frozen", "scalar", "rank", "method"]
    )
    if change == "drop":
        del tensors[name]
    elif change == "foreign":
        tensors["anything.else/A"] = dense_entry(torch.ones(2, 3))
    elif change in ("nan", "huge"):
        value = float("nan") if change == "nan" else 3e38
        tensors[name] = Dense(tensors[name].shape, tensors[name].values * 0 + value)
    elif change == "wide":
        tensors[name] = dense_entry(torch.zeros(999, 32))
    elif change == "vast":  # finding: some bytes that stand for gigabytes
        nothing = torch.empty(0, dtype=torch.int64)
        tensors[name] = Sparse((2**13, 2**14), nothing, torch.empty(0))
    elif change == "frozen":
        pair = LoraPair(torch.ones(3, 32), torch.ones(32, 3))
        tensors |= {"model.layers.0.self_attn.q_proj/frozen_A": dense_entry(pair.A)}
    elif change == "scalar":
        tensors[name] = dense_entry(torch.ones(()))
    elif change == "rank":
        tensors[name] = dense_entry(torch.ones(1, 32))
    header = Header(
        kind,
        "flora" if change == "method" else desk.place.setup.job.method.name,
        draw.choice([0, 1, 2, 99]),
        state.version + draw.choice([0, 0, 1, 2**40]),
        draw.choice([state.digest, "0" * 32]),
        result_digest="1" * 32 if kind == "change" else "",
        num_examples=3 if kind == "update" else 0,
    )
    return encode(Message(header, tensors))


class Fuzz:
    """One desk, what it was asked, and what must hold after every answer."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.seed = seed
        with quiet_transformers():
            tiny_models.llama().save_pretrained(folder / "model")
            tiny_models.tokenizer().save_pretrained(folder / "model")
        rows = [json.dumps({"instruction": f"{SECRET} {number}", "output": "b"}) for number in range(30)]
        (folder / "data.jsonl").write_text("\n".join(rows))
        self.state = folder / "state"
        self.desk = Desk(
            SiteConfig(
                name="lab",
                model=str(folder / "model"),
                data=str(folder / "data.jsonl"),
                device="cpu",
                threads=1,
                state=str(self.state),
                policy=POLICY,
            )
        )
        self.base = base_digest(folder / "model")
        self.known: dict[str, str] = {}
        self.sent: list[bytes] = []
        self.counts: Counter[str] = Counter()
        self.slowest = 0.0
        self.log = logging.getLogger("fedloom.worker")
        self.log.addHandler(logging.Handler())
        self.log.handlers[-1].emit = self.check_log
        self.log.propagate = False
        self.log.setLevel(logging.INFO)

    def check_log(self, record: logging.LogRecord) -> None:
        first, *more = record.getMessage().split("\n")
        assert first.isprintable() and all(line.startswith("  | ") and line.isprintable() for line in more), record

    def request(self, draw: random.Random) -> Parcel:
        """What a server that means harm might ask next."""
        current = self.desk.place
        odd = draw.random()
        if current is None or not self.known or odd < 0.01:
            job, settings = f"{draw.getrandbits(64):016x}", tomli_w.dumps(SETTINGS)
        elif odd < 0.4:
            job, settings = current.job, current.settings
        else:
            job = draw.choice([f"{draw.getrandbits(64):016x}", current.job])
            settings = mutated_settings(draw)
        facts = {
            "ask": draw.choice(["hello", "turn", "turn", "deliver"]),
            "job": job,
            "settings": settings,
            "base": self.base if draw.random() < 0.95 else draw.choice(["", FORGED, "0" * 32]),
            "round": draw.choice([0, 1, 1, 2, 2, 3, 3, 4, 2**60]),
            "counted": draw.choice([0, 0, 1, 2, 99, 2**60]),
        }
        if draw.random() < 0.05:
            facts[draw.choice([*facts, "more"])] = draw.choice([None, -1, 1.5, "", FORGED, 2**70, True, "\ud800"])
        payloads = tuple(odd_payload(draw, self.desk, self.sent) for _ in range(draw.choice([0, 0, 0, 0, 1, 2])))
        return Parcel(facts, payloads)

    def play(self, number: int) -> None:
        """One request, and what must hold after it."""
        parcel = self.request(random.Random(f"{self.seed} {number}"))
        if number % 1000 == 0:
            print(f"request {number}: {dict(self.counts)}", file=sys.stderr, flush=True)
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its default is to kill: no code of Python's could stop a regex
        reply = self.desk.answer(parcel)
        signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest = max(self.slowest, time.process_time() - began)
        ask, job = str(parcel.facts["ask"]), str(parcel.facts["job"])
        error = reply.facts.get("error")
        assert (error is None) == ("busy" in reply.facts), reply
        assert SECRET not in str(error), error
        self.counts["refused" if error else ask] += 1
        if error is None:
            self.known.setdefault(job, str(parcel.facts["settings"]))
            self.check_answer(parcel, reply, job)
        self.check_disk()

    def check_answer(self, parcel: Parcel, reply: Parcel, job: str) -> None:
        settings, round = str(parcel.facts["settings"]), int(parcel.facts["round"])
        assert settings == self.known[job] and parcel.facts["base"] == self.base
        turn = parcel.facts["ask"] == "turn"
        broken = breaks_policy(settings, round if turn else 1)
        assert not broken, f"{broken} was passed over: {settings}"
        assert len(reply.payloads) == turn
        for payload in reply.payloads:
            message = decode(payload)
            assert message.header.kind == "update" and len(payload) <= 256_000
            kinds = {name.rpartition("/")[0].rpartition(".")[2] for name in message.entries}
            assert kinds <= set(POLICY.modules), kinds
            self.sent.append(payload)

    def check_disk(self) -> None:
        jobs = self.state / "jobs"
        found = {path.name for path in jobs.iterdir()} if jobs.exists() else set()
        assert found <= set(self.known), f"left of refused jobs: {found - set(self.known)}"
        size = sum(path.stat().st_size for path in self.state.rglob("*") if path.is_file())
        assert size <= 64 * 2**20, size


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faulthandler.register(signal.SIGPROF, chain=True)  # says where it was, and then dies of the signal
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(Path(folder), options.seed)
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        began = time.monotonic()
        for number in range(options.count):
            try:
                fuzz.play(number)
            except BaseException:
                print(f"request {number} of seed {options.seed}", file=sys.stderr)
                raise
        lines, moved, unlisted = fuzz.desk.trail.verify()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    told = {"requests": options.count, **fuzz.counts, "lines": len(lines), "moved": len(moved) + len(unlisted)}
    told |= {"seconds": round(time.monotonic() - began), "slowest_cpu": round(fuzz.slowest, 2), "peak_mib": peak}
    print(json.dumps(told))


if __name__ == "__main__":
    main()
