"""All that a run needs to go on, in one safetensors file that is either whole or not there.

Equal tensors are stored once, and so is the list of a state's tensors that several participants share: a client in
step with others costs a line.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file
from torch import Tensor

from fedloom.errors import CheckpointError
from fedloom.lora.pair import LoraState, from_tensors
from fedloom.methods.method import SHARED, State
from fedloom.workspace.keys import PayloadKeys, fits_key, payload_key, tensor_key

KEEP = 2
"""Checkpoints kept in a run: the newest, and the one before it in case the disk loses the newest."""

_FORMAT = "fedloom-checkpoint-6"
_READ = (_FORMAT, "fedloom-checkpoint-5", "fedloom-checkpoint-4")
"""Formats that can be read. In 5 and 4 no state has a curvature; in 4 all keys are blake2b's."""
SERVER = "server"
"""The name of the server's state in a checkpoint."""
BEST = "best"
"""The name of the best round's state."""
CLIENT = "client/"
"""Before a client's name: no client can take the server's place."""
UNDERWAY = "underway/"
"""Before the names of what belongs to turns under way."""


@dataclass(frozen=True, slots=True)
class KnownSite:
    """What a server knows of a site elsewhere: the version and digest of the global state that it holds, the last round
    in which an update of it was averaged (0: none), and whether it has confirmed that it received the result.
    """

    version: int
    digest: str = ""
    counted: int = 0
    delivered: bool = False


@dataclass(frozen=True, eq=False, slots=True)
class Snapshot:
    """A run after `round` rounds. archive: version → broadcast; digests: see `catchup.Archive`.

    fingerprint: of settings, base weights and data. clients: the states of clients in this process; known: what is
    known of sites elsewhere. best: the server's state after the round with the best score on the validation split,
    where the run shall end with it. seconds: what the run took up to then, in all its sessions. underway: of
    asynchronous rounds, the turns that are under way and the updates that wait.
    """

    round: int
    server: State
    clients: Mapping[str, State] = field(default_factory=dict)
    archive: Mapping[int, bytes] = field(default_factory=dict)
    ledger_rows: int = 0
    fingerprint: str = ""
    known: Mapping[str, KnownSite] = field(default_factory=dict)
    best: State | None = None
    seconds: float = 0.0
    underway: Contents | None = None
    digests: Mapping[int, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, slots=True)
class Contents:
    """What a file of states holds: states and blobs by name, and facts that are plain JSON.

    left: blob → bytes of it that were left in the file. fixed: blobs that are the same under their name as long as the
    keys of a `PayloadKeys` are kept.
    """

    states: Mapping[str, State]
    blobs: Mapping[str, bytes] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    left: Mapping[str, int] = field(default_factory=dict)
    fixed: frozenset[str] = frozenset()

    def joined(self, other: Contents) -> Contents:
        """Both, whose names differ."""
        return Contents(
            {**self.states, **other.states}, {**self.blobs, **other.blobs}, {**self.facts, **other.facts}, self.left
        )


def save_checkpoint(folder: Path, snapshot: Snapshot, keys: PayloadKeys | None = None) -> Path:
    """Write `folder/round-NNNNN.safetensors` atomically and drop all but the newest `KEEP`.

    keys: of what was hashed for the checkpoints before this one.
    """
    best = {} if snapshot.best is None else {BEST: snapshot.best}
    underway = snapshot.underway or Contents({})
    return save_contents(
        folder,
        snapshot.round,
        Contents(
            states={SERVER: snapshot.server}
            | best
            | {CLIENT + name: state for name, state in snapshot.clients.items()}
            | {UNDERWAY + name: state for name, state in underway.states.items()},
            blobs={str(version): payload for version, payload in snapshot.archive.items()}
            | {UNDERWAY + name: payload for name, payload in underway.blobs.items()},
            facts={
                "round": snapshot.round,
                "ledger_rows": snapshot.ledger_rows,
                "fingerprint": snapshot.fingerprint,
                "known": {name: asdict(known) for name, known in snapshot.known.items()},
                "seconds": snapshot.seconds,
                # One text: a list of a thousand pairs would take longer to write than the rest of a small run's round.
                "digests": " ".join(f"{version}:{digest}" for version, digest in snapshot.digests.items()),
                **({"underway": dict(underway.facts)} if snapshot.underway else {}),
            },
            fixed=frozenset(map(str, snapshot.archive)),
        ),
        keys,
    )


def load_checkpoint(path: Path) -> Snapshot:
    """Read a checkpoint back. Raises CheckpointError, naming the file, if it is missing, truncated or altered."""
    held = load_contents(path)
    return Snapshot(
        round=held.facts["round"],
        server=held.states[SERVER],
        clients={name.removeprefix(CLIENT): state for name, state in held.states.items() if name.startswith(CLIENT)},
        archive={int(name): payload for name, payload in held.blobs.items() if not name.startswith(UNDERWAY)},
        ledger_rows=held.facts["ledger_rows"],
        fingerprint=held.facts["fingerprint"],
        known={name: KnownSite(**facts) for name, facts in held.facts["known"].items()},
        best=held.states.get(BEST),
        seconds=held.facts.get("seconds", 0.0),  # checkpoints of before it was kept, here and in the next line
        digests=_digests_in(held.facts.get("digests", "")),
        underway=_underway_in(held),
    )


def _digests_in(text: str) -> dict[int, str]:
    pairs = (pair.partition(":") for pair in text.split())
    return {int(version): digest for version, _, digest in pairs}


def _underway_in(held: Contents) -> Contents | None:
    """What belongs to turns under way, in asynchronous rounds."""
    if "underway" not in held.facts:
        return None
    states = {name.removeprefix(UNDERWAY): kept for name, kept in held.states.items() if name.startswith(UNDERWAY)}
    blobs = {name.removeprefix(UNDERWAY): kept for name, kept in held.blobs.items() if name.startswith(UNDERWAY)}
    return Contents(states, blobs, held.facts["underway"])


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint files of a run, oldest first."""
    return sorted(folder.glob("round-*.safetensors"))


def save_contents(folder: Path, round: int, contents: Contents, keys: PayloadKeys | None = None) -> Path:
    """Write `folder/round-NNNNN.safetensors` atomically and drop all but the newest `KEEP`; `keys`: see above."""
    shelves = _Shelves(keys or PayloadKeys())
    meta = {
        "format": _FORMAT,
        "states": {name: shelves.party(state) for name, state in contents.states.items()},
        "blobs": shelves.put_blobs(contents.blobs, contents.fixed),
        "facts": dict(contents.facts),
        "shelves": shelves.names,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"round-{round:05d}.safetensors"
    partial = path.with_suffix(".partial")
    # Written from where the tensors lie: a copy of them all would take as much memory as the states themselves. Two may
    # share memory, as those of a client of lower rank do with the server's.
    specs = {
        key: TensorSpec(
            dtype=str(tensor.dtype).rpartition(".")[2],
            shape=list(tensor.shape),
            data_ptr=tensor.data_ptr(),
            data_len=tensor.nbytes,
        )
        for key, tensor in shelves.tensors.items()
    }
    try:
        serialize_file(specs, partial, metadata={"fedloom": json.dumps(meta, sort_keys=True)})
        _sync(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)  # on a full disk its room is needed to say how the run ended
        raise CheckpointError(f"{path} cannot be written ({error}); what was saved before it is kept") from None
    _sync(folder)
    for old in list_checkpoints(folder)[:-KEEP]:
        old.unlink()
    return path


def load_contents(path: Path, *, leave: Collection[str] = ()) -> Contents:
    """Read such a file back, but for the blobs that are to be left in it.

    Raises CheckpointError, naming the file, if it is missing, truncated or altered.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = _read_meta(path, file)
            blobs = meta["shelves"][meta["blobs"]]
            left = {name: _size_of(file, blobs[name]) for name in leave if name in blobs}
            tensors = {
                key: _read_tensor(path, file, key)
                for shelf in meta["shelves"]
                for name, key in shelf.items()
                if not (shelf is blobs and name in left)
            }
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it to go on from the one before") from None
    shelves = [{name: tensors[key] for name, key in shelf.items() if key in tensors} for shelf in meta["shelves"]]
    held: dict[int, LoraState] = {}

    def lora(shelf: int) -> LoraState:
        if shelf not in held:
            held[shelf] = from_tensors(shelves[shelf])
        return held[shelf]

    def party(version: int, digest: str, *parts: int) -> State:
        *shared, memory = parts
        kept = {part: lora(shelf) for part, shelf in zip(SHARED, shared, strict=False)}
        return State(**kept, memory=shelves[memory], version=version, digest=digest)

    return Contents(
        states={name: party(*parts) for name, parts in meta["states"].items()},
        blobs={name: tensor.numpy().tobytes() for name, tensor in shelves[meta["blobs"]].items() if name not in left},
        facts=meta["facts"],
        left=left,
    )


def load_blob(path: Path, name: str) -> bytes:
    """One blob of such a file, b"" where it has none of this name. Raises CheckpointError as `load_contents` does."""
    try:
        with safe_open(path, framework="pt") as file:
            meta = _read_meta(path, file)
            key = meta["shelves"][meta["blobs"]].get(name)
        blob = b"" if key is None else _read_bytes(path, key)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); delete it to go on from the one before") from None
    if key is not None and not fits_key(_tensor_of(blob), key):
        raise CheckpointError(f"{path} has been altered (tensor {key}); delete it to go on from the one before")
    return blob


def _read_meta(path: Path, file: Any) -> dict[str, Any]:  # noqa: ANN401 (safetensors names no type)
    meta: dict[str, Any] = json.loads((file.metadata() or {}).get("fedloom", "{}"))
    if meta.get("format") not in _READ:
        raise CheckpointError(f"{path} is not a checkpoint of this version of fedloom (expected format {_FORMAT})")
    return meta


def _read_tensor(path: Path, file: Any, key: str) -> Tensor:  # noqa: ANN401 (safetensors names no type)
    # Copies lie on boundaries of 64 bytes, as tensors that were computed do; views of the file need not, and the matrix
    # kernels round the last bits of odd shapes in another way there.
    tensor: Tensor = file.get_tensor(key).clone()
    if not fits_key(tensor, key):
        raise CheckpointError(f"{path} has been altered (tensor {key}); delete it to go on from the one before")
    return tensor


def _read_bytes(path: Path, key: str) -> bytes:
    """A tensor of bytes as it lies in the file. Through safetensors it would be in memory three times for a while."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        begin, end = json.loads(file.read(size))[key]["data_offsets"]
        file.seek(8 + size + begin)
        return file.read(end - begin)


def _size_of(file: Any, key: str) -> int:  # noqa: ANN401 (safetensors names no type)
    """Bytes of a blob, which is a tensor of bytes."""
    return int(file.get_slice(key).get_shape()[0])


class _Shelves:
    """What is to be stored: tensors by content, and lists of tensors, each list once however many share the object."""

    def __init__(self, keys: PayloadKeys) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.names: list[dict[str, str]] = []
        self._keys = keys
        self._places: dict[int, tuple[int, object]] = {}

    def party(self, state: State) -> list[int | str]:
        """A participant's state: version, digest, and the shelves of its parts."""
        return [state.version, state.digest, *(self.put(part) for part in state.shared), self.put(state.memory)]

    def put(self, named: LoraState | Mapping[str, Tensor]) -> int:
        """The number of the shelf that holds these tensors."""
        named = named or _NOTHING  # thousands of clients remember nothing, each in an object of its own
        if id(named) not in self._places:
            tensors = named.tensors() if isinstance(named, LoraState) else named
            self._place(named, {name: self._store(tensor_key(tensor), tensor) for name, tensor in tensors.items()})
        return self._places[id(named)][0]

    def put_blobs(self, blobs: Mapping[str, bytes], fixed: frozenset[str]) -> int:
        """The number of the shelf that holds these blobs, of which those named in `fixed` never change."""
        tensors = {name: _tensor_of(blob) for name, blob in blobs.items()}
        self._keys.forget(fixed)
        names = {
            name: self._store(self._keys.of(name, held) if name in fixed else payload_key(held), held)
            for name, held in tensors.items()
        }
        return self._place(blobs, names)

    def _place(self, named: object, names: dict[str, str]) -> int:
        self._places[id(named)] = len(self.names), named  # held on to, so that no other object gets its id
        self.names.append(names)
        return len(self.names) - 1

    def _store(self, key: str, tensor: Tensor) -> str:
        if key not in self.tensors:
            self.tensors[key] = tensor.detach().cpu().contiguous()
        return key


_NOTHING: Mapping[str, Tensor] = {}


def _tensor_of(payload: bytes) -> Tensor:
    """The bytes as they lie, as a tensor that is only read."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*not writable", UserWarning)
        return torch.frombuffer(payload, dtype=torch.uint8)


def _sync(path: Path) -> None:
    """Have the file or folder on disk before going on."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
