"""All that a run needs to go on, in one safetensors file that is either whole or not there.

Equal tensors are stored once: clients in step with the server cost nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedloom.errors import CheckpointError
from fedloom.lora import from_tensors
from fedloom.method import State

KEEP = 2
"""Checkpoints kept in a run: the newest, and the one before it in case the disk loses the newest."""

_FORMAT = "fedloom-checkpoint-1"
_LORA_FIELDS = ("adapter", "frozen", "tail")


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """A run after `round` rounds. archive: version → broadcast. fingerprint: of settings, base weights and data."""

    round: int
    server: State
    clients: Mapping[str, State]
    archive: Mapping[int, bytes] = field(default_factory=dict)
    ledger_rows: int = 0
    fingerprint: str = ""


def save(folder: Path, snapshot: Snapshot) -> Path:
    """Write `folder/round-NNNNN.safetensors` atomically and drop all but the newest `KEEP`."""
    tensors: dict[str, Tensor] = {}
    index: list[tuple[str, str, str, str]] = []
    for party, part, name, tensor in _flat(snapshot):
        key = _key(tensor)
        if key not in tensors:
            # A client of lower rank holds views of the server's tensors; safetensors stores no shared memory.
            tensors[key] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        index.append((party, part, name, key))
    parties = {"server": snapshot.server, **{f"client:{name}": state for name, state in snapshot.clients.items()}}
    meta = {
        "format": _FORMAT,
        "round": snapshot.round,
        "ledger_rows": snapshot.ledger_rows,
        "fingerprint": snapshot.fingerprint,
        "index": index,
        "parties": {name: [state.version, state.digest] for name, state in parties.items()},
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{snapshot.round:05d}.safetensors"
    partial = path.with_suffix(".partial")
    save_file(tensors, partial, metadata={"fedloom": json.dumps(meta, sort_keys=True)})
    _sync(partial)
    os.replace(partial, path)
    _sync(folder)
    for old in checkpoints(folder)[:-KEEP]:
        old.unlink()
    return path


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a run, oldest first."""
    return sorted(folder.glob("round-*.safetensors"))


def load(path: Path) -> Snapshot:
    """Read a checkpoint back. Raises CheckpointError, naming the file, if it is missing, truncated or altered."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = json.loads((file.metadata() or {}).get("fedloom", "{}"))
            # Copies lie on boundaries of 64 bytes, as tensors that were computed do; views of the file need not, and
            # the matrix kernels round the last bits of odd shapes in another way there.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it to go on from the one before") from None
    if meta.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is no checkpoint of this version of fedloom (expected format {_FORMAT})")
    for key, tensor in tensors.items():
        if _key(tensor) != key:
            raise CheckpointError(f"{path} has been altered (tensor {key}); delete it to go on from the one before")
    parties: dict[str, dict[str, dict[str, Tensor]]] = {name: {} for name in ["archive", *meta["parties"]]}
    for party, part, name, key in meta["index"]:
        parties[party].setdefault(part, {})[name] = tensors[key]
    states = {name: _state(parties[name], *facts) for name, facts in meta["parties"].items()}
    return Snapshot(
        round=meta["round"],
        server=states.pop("server"),
        clients={name.removeprefix("client:"): state for name, state in states.items()},
        archive={int(name): tensor.numpy().tobytes() for name, tensor in parties["archive"].get("payload", {}).items()},
        ledger_rows=meta["ledger_rows"],
        fingerprint=meta["fingerprint"],
    )


def _flat(snapshot: Snapshot) -> Iterator[tuple[str, str, str, Tensor]]:
    parties = {"server": snapshot.server, **{f"client:{name}": state for name, state in snapshot.clients.items()}}
    for party, state in parties.items():
        for part in _LORA_FIELDS:
            for name, tensor in getattr(state, part).tensors().items():
                yield party, part, name, tensor
        for name, tensor in state.memory.items():
            yield party, "memory", name, tensor
    for version, payload in snapshot.archive.items():
        yield "archive", "payload", str(version), torch.frombuffer(bytearray(payload), dtype=torch.uint8)


def _state(parts: Mapping[str, Mapping[str, Tensor]], version: int, digest: str) -> State:
    adapter, frozen, tail = (from_tensors(parts.get(part, {})) for part in _LORA_FIELDS)
    return State(adapter, frozen, tail, parts.get("memory", {}), version, digest)


def _key(tensor: Tensor) -> str:
    """A name that only this content, shape and type have."""
    hasher = hashlib.blake2b(f"{tuple(tensor.shape)}{tensor.dtype}".encode(), digest_size=16)
    hasher.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return hasher.hexdigest()


def _sync(path: Path) -> None:
    """Have the file or folder on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
