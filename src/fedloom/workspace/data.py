"""The examples of a run: each client's, those that scores are taken on, and what to say about them beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path

from fedloom.errors import ConfigError, DataError
from fedloom.model.examples import Example
from fedloom.model.partition import Manifest, partition
from fedloom.model.sources import Tell, client_sources, ignore, load_examples, locate_files
from fedloom.records.config import Config, DataSettings, Source

MOST_NAMED = 12
"""Clients whose numbers of examples are told one by one."""


@dataclass(frozen=True, slots=True)
class Part:
    """A source with the settings by which its rows are read, and the split that is read of it."""

    source: Path | str
    settings: DataSettings
    split: str = "train"

    def read(self, tell: Tell) -> list[Example]:
        return load_examples(self.source, self.split, self.settings, tell)


def client_examples(config: Config, tell: Tell = ignore) -> tuple[dict[str, list[Example]], Manifest | None]:
    """(client → its examples, manifest): a file or folder each, or everything pooled, shuffled and split."""
    settings, federation = config.data, config.federation
    found = {client: _read(parts, tell) for client, parts in _trained_parts(settings).items()}
    if settings.partitioner == "files":
        if federation.num_clients not in (None, len(found)):
            where = settings.source or "data.sources"
            raise ConfigError(
                f"federation.num_clients is {federation.num_clients}, but {where} holds data for {len(found)}"
            )
        return found, None
    pooled = list(chain.from_iterable(found.values()))
    manifest = partition(pooled, settings, federation)
    return {client: [pooled[index] for index in held] for client, held in manifest.clients.items()}, manifest


def heldout_examples(settings: DataSettings, tell: Tell = ignore) -> dict[str, list[Example]]:
    """Domain → examples to score."""
    return read_split(settings, settings.heldout, tell) if settings.heldout else {}


def validation_examples(config: Config, tell: Tell = ignore) -> dict[str, list[Example]]:
    """Domain → examples to choose a round on; none where no setting asks for that."""
    if not config.federation.validates:
        return {}
    return read_split(config.data, config.data.validation, tell) if config.data.validation else {}


def read_split(settings: DataSettings, name: str, tell: Tell = ignore) -> dict[str, list[Example]]:
    """Domain → the examples of a split."""
    return {domain: _read(parts, tell) for domain, parts in _split_parts(settings, name).items()}


def public_examples(config: Config, tell: Tell = ignore) -> list[Example]:
    """The examples of federation.public, none where it is not set.

    Raises ConfigError where it is a file that scores are taken on: they would be too good.
    """
    path = config.federation.public
    if path is None:
        return []
    held = {file.resolve() for file in locate_files(path)}
    for parts in _split_parts(config.data, config.data.heldout).values():
        for file in chain.from_iterable(locate_files(part.source, part.split) for part in parts):
            if file.resolve() in held:
                raise ConfigError(f"federation.public reads {file}, which scores are taken on (data.heldout)")
    return Part(path, config.data).read(tell)


def _read(parts: Sequence[Part], tell: Tell) -> list[Example]:
    return [example for part in parts for example in part.read(tell)]


def _trained_parts(settings: DataSettings) -> dict[str, list[Part]]:
    """Client → what it is trained on; where one source is split among clients, the source itself under its own name."""
    if settings.sources is not None:
        return {client: [_own_part(settings, one) for one in held] for client, held in settings.sources.items()}
    found = (client_sources if settings.partitioner == "files" else sources_by_client)(settings.source)
    return {client: [Part(source, settings)] for client, source in found.items()}


def _own_part(settings: DataSettings, own: Source) -> Part:
    """A source with what its table has in place of [data]'s."""
    given = {"subset": own.subset, "columns": own.columns}
    return Part(
        own.source, settings.model_copy(update={key: value for key, value in given.items() if value is not None})
    )


def _split_parts(settings: DataSettings, name: str | None) -> dict[str, list[Part]]:
    """Domain → a split beside the training data, or files of their own."""
    if name is None:
        return {}
    if "{client}" in name or Path(name).is_absolute() or Path(name).exists():
        return {domain: [Part(path, settings)] for domain, path in sources_by_client(name).items()}
    if settings.sources is not None:
        trained = _trained_parts(settings)
        return {domain: [replace(part, split=name) for part in parts] for domain, parts in trained.items()}
    return {domain: [Part(path, settings, name)] for domain, path in sources_by_client(settings.source).items()}


def check_unseen(settings: DataSettings) -> None:
    """Raises ConfigError where a file is both trained on and scored on."""
    trained = {
        file.resolve()
        for parts in _trained_parts(settings).values()
        for part in parts
        for file in locate_files(part.source)
    }
    for parts in _split_parts(settings, settings.heldout).values():
        for file in chain.from_iterable(locate_files(part.source, part.split) for part in parts):
            if file.resolve() in trained:
                raise ConfigError(
                    f"data.heldout reads {file}, which is trained on: its score would say nothing about new examples; "
                    "keep some examples in a file of their own"
                )


def sources_by_client(source: str) -> dict[str, Path | str]:
    """One source per client where the text has {client} in it, otherwise the source itself under its own name."""
    return dict(client_sources(source)) if "{client}" in source else {Path(source).stem: source}


def describe_examples(clients: Mapping[str, Sequence[Example]], heldout: Mapping[str, Sequence[Example]]) -> list[str]:
    """What is worth knowing of examples before training: how many each client holds, and how many outputs are empty.

    Raises DataError for a client, or a held-out set, that has no other outputs than empty ones.
    """
    notes = []
    sets = {f"client {name}": held for name, held in clients.items()}
    for name, held in (sets | {f"held-out set {name}": held for name, held in heldout.items()}).items():
        empty = sum(not example.output.strip() for example in held)
        if empty and empty == len(held):
            raise DataError(f"{name}: all {empty:,} outputs are empty; is another column the answer (data.columns)?")
        if empty:
            notes.append(f"{name}: {empty:,} of {len(held):,} outputs are empty, which teach to answer nothing")
    counts = {name: len(held) for name, held in clients.items() if held}
    if counts:
        notes.insert(0, _describe_counts(counts))
    return notes


def _describe_counts(counts: Mapping[str, int]) -> str:
    if len(counts) <= MOST_NAMED:
        return "examples: " + ", ".join(f"{name} {count:,}" for name, count in counts.items())
    sizes = counts.values()
    return f"examples: {min(sizes):,} to {max(sizes):,} at each of {len(counts):,} clients, {sum(sizes):,} in all"
