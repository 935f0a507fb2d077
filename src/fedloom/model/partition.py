"""Who holds which examples: one source split among clients, from a seed, and kept as a manifest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from fedloom.compress.seeds import derived_seed
from fedloom.errors import DataError
from fedloom.model.examples import Example
from fedloom.records.config import DataSettings, FederationSettings

SHARDS_PER_CLIENT = 2
"""As in McMahan et al.: with ten labels most clients hold two of them."""


@dataclass(frozen=True, slots=True)
class SplitSettings:
    """What a split depends on beside the examples: partitioner, clients, seed, the column read, the Dirichlet's alpha.

    "natural" takes as many clients as there are ids; num_clients says nothing there.
    """

    partitioner: str
    num_clients: int
    seed: int
    column: str | None
    alpha: float
    shards_per_client: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """A split as it was made: its settings, the digest of the data, and every client's indices into the examples."""

    settings: SplitSettings
    digest: str
    clients: Mapping[str, list[int]]


def partition(examples: Sequence[Example], data: DataSettings, federation: FederationSettings) -> Manifest:
    """Every example to exactly one client; the examples are shuffled first. Raises DataError for an empty client."""
    settings = SplitSettings(
        partitioner=data.partitioner,
        num_clients=federation.num_clients or 1,
        seed=federation.seed,
        column=data.id_column if data.partitioner == "natural" else data.label_column,
        alpha=data.dirichlet_alpha,
        shards_per_client=SHARDS_PER_CLIENT,
    )
    if len(examples) < settings.num_clients:
        raise DataError(f"{len(examples)} examples cannot be split among {settings.num_clients} clients")
    rng = np.random.default_rng(derived_seed(settings.seed, "partition", settings.partitioner))
    order = rng.permutation(len(examples))
    clients = PARTITIONERS[settings.partitioner](examples, order, settings, rng)
    for client, indices in clients.items():
        if not indices:
            raise DataError(
                f"client {client!r} gets no examples from {settings.partitioner!r} with seed {settings.seed}: "
                "use fewer clients, a larger dirichlet alpha, or another seed"
            )
    return Manifest(settings, data_digest(examples), clients)


def _names(count: int) -> list[str]:
    width = max(2, len(str(count - 1)))
    return [f"client-{index:0{width}d}" for index in range(count)]


def _iid(
    examples: Sequence[Example], order: np.ndarray, settings: SplitSettings, rng: np.random.Generator
) -> dict[str, list[int]]:
    """Equal shares, sizes differing by one at most."""
    parts = np.array_split(order, settings.num_clients)
    return {name: part.tolist() for name, part in zip(_names(settings.num_clients), parts, strict=True)}


def _dirichlet(
    examples: Sequence[Example], order: np.ndarray, settings: SplitSettings, rng: np.random.Generator
) -> dict[str, list[int]]:
    """Each label's examples in proportions drawn from Dirichlet(alpha) (Hsu et al., arXiv 1909.06335).

    With many clients some would be left with nothing: those take one example each, from whoever then holds the most.
    """
    held: list[list[int]] = [[] for _ in range(settings.num_clients)]
    for indices in _by_value(examples, order, settings).values():
        shares = rng.dirichlet(np.full(settings.num_clients, settings.alpha))
        cuts = np.rint(np.cumsum(shares)[:-1] * len(indices)).astype(int)
        for client, part in zip(held, np.split(np.array(indices), cuts), strict=True):
            client.extend(part.tolist())
    for client in held:
        if not client:
            client.append(max(held, key=len).pop())
    return dict(zip(_names(settings.num_clients), held, strict=True))


def _shards(
    examples: Sequence[Example], order: np.ndarray, settings: SplitSettings, rng: np.random.Generator
) -> dict[str, list[int]]:
    """Sorted by label, cut into equal shards, a few of them to each client (McMahan et al., arXiv 1602.05629)."""
    in_order = [index for indices in _by_value(examples, order, settings).values() for index in indices]
    shards = np.array_split(np.array(in_order), settings.num_clients * settings.shards_per_client)
    dealt = rng.permutation(len(shards)).reshape(settings.num_clients, settings.shards_per_client)
    held = [np.concatenate([shards[shard] for shard in own]).tolist() for own in dealt]
    return dict(zip(_names(settings.num_clients), held, strict=True))


def _natural(
    examples: Sequence[Example], order: np.ndarray, settings: SplitSettings, rng: np.random.Generator
) -> dict[str, list[int]]:
    """One client for each value of the id column, named by it."""
    return _by_value(examples, order, settings)


def _by_value(examples: Sequence[Example], order: np.ndarray, settings: SplitSettings) -> dict[str, list[int]]:
    """Value of the column → indices in the order given; values sorted."""
    column = settings.column
    if column is None:
        raise DataError(
            f"partitioner {settings.partitioner!r} needs the name of a column (data.label_column or id_column)"
        )
    groups: dict[str, list[int]] = {}
    for index in order.tolist():
        value = examples[index].columns.get(column)
        if not isinstance(value, str | int | float | bool):
            have = ", ".join(sorted(examples[index].columns))
            raise DataError(
                f"example {index + 1} has no label or id in column {column!r}, which partitioner "
                f"{settings.partitioner!r} reads; it has columns {have}"
            )
        groups.setdefault(str(value), []).append(index)
    return dict(sorted(groups.items()))


Partitioner = Callable[[Sequence[Example], np.ndarray, SplitSettings, np.random.Generator], dict[str, list[int]]]
PARTITIONERS: Mapping[str, Partitioner] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "shards": _shards,
    "natural": _natural,
}


def data_digest(examples: Sequence[Example]) -> str:
    """32 hex digits that differ when any text, or the order, of the examples differs."""
    hasher = hashlib.blake2b(digest_size=16)
    for example in examples:
        texts = [example.instruction, example.input, example.output, example.history]
        hasher.update(json.dumps(texts, ensure_ascii=True).encode() + b"\n")
    return hasher.hexdigest()


def save_manifest(path: str | Path, manifest: Manifest) -> None:
    """Write a manifest as JSON."""
    Path(path).write_text(json.dumps(asdict(manifest), indent=1) + "\n", encoding="utf-8")


def load_manifest(path: str | Path, examples: Sequence[Example]) -> Manifest:
    """Read a manifest back. Raises DataError if it is damaged, or if the data are no longer those it was made from."""
    try:
        stored = json.loads(Path(path).read_text(encoding="utf-8"))
        clients = {str(name): [int(index) for index in indices] for name, indices in stored["clients"].items()}
        manifest = Manifest(SplitSettings(**stored["settings"]), str(stored["digest"]), clients)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a readable split manifest ({type(error).__name__}: {error})") from None
    if manifest.digest != data_digest(examples):
        raise DataError(f"{path} was made from other data: restore the data file, or delete the manifest to split anew")
    held = sorted(index for indices in manifest.clients.values() for index in indices)
    if held != list(range(len(examples))):
        raise DataError(f"{path} does not give every example to exactly one client: delete it to split anew")
    return manifest
