"""How a user's program uses fedloom, for the type checker: `make lint` reads this, nothing runs it.

`assert_type` fails where a name is `Any` or `object`, which is what a package without a stub gives.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import assert_type

import fedloom


def runs() -> None:
    bed = fedloom.testbed(settings={"training.max_steps": 1})
    run = fedloom.run(bed, method="fedsrd", num_rounds=5)
    assert_type(bed, fedloom.Config)
    assert_type(run, fedloom.Run)
    assert_type(run.scores["mean"], float)
    assert_type(run.heldout_losses_by_round, Mapping[int, Mapping[str, float]])
    assert_type(run.bytes, int)
    assert_type(run.plot(), fedloom.Picture)
    assert_type(run.payloads[-1], bytes)
    assert_type(run.adapter, fedloom.LoraState)
    assert_type(fedloom.Run.open("runs/first"), fedloom.Run)
    both = fedloom.compare(bed, ["fedit", fedloom.build("fedsrd")], seeds=3)
    assert_type(both, fedloom.Comparison)
    assert_type(both.scores, Mapping[str, Sequence[float]])
    assert_type(fedloom.merge(["a", "b"], weights=[1, 2]).save("out"), Path)


def payloads(payload: bytes) -> None:
    described = fedloom.describe(payload)
    assert_type(described, fedloom.Description)
    assert_type(described.size, int)
    message = fedloom.decode(payload)
    assert_type(message, fedloom.Message)
    assert_type(message.header, fedloom.Header)
    assert_type(message.entries, Mapping[str, fedloom.Dense | fedloom.Sparse | fedloom.Seeded])
    assert_type(fedloom.encode(message), bytes)


def by_hand(train: fedloom.Train) -> None:
    method = fedloom.replace(fedloom.build("fedit"), name="mine")
    assert_type(method, fedloom.Method)
    assert_type(method.compress, fedloom.Compress)
    job = fedloom.Job(method, seed=0, quantize=fedloom.quantize("int8"))
    adapter = fedloom.initial_state({"q": (4, 3)}, {"q": 2}, seed=0)
    assert_type(adapter["q"], fedloom.LoraPair)
    assert_type(fedloom.start(job, adapter), fedloom.State)
    assert_type(fedloom.Federation(job, adapter, {"a": None}).round(train), fedloom.RoundResult)
