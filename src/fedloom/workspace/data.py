"""The examples of a run: each client's, those that scores are taken on, and what to say about them beforehand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedloom.errors import ConfigError, DataError
from fedloom.model.examples import Example
from fedloom.model.partition import Manifest, partition
from fedloom.model.sources import Tell, client_sources, ignore, load_examples, locate_files
from fedloom.records.config import Config, DataSettings

MOST_NAMED = 12
"""Clients whose numbers of examples are told one by one."""


def client_examples(config: Config, tell: Tell = ignore) -> tuple[dict[str, list[Example]], Manifest | None]:
    """(client → its examples, manifest): a file or folder each, or everything pooled, shuffled and split."""
    settings, federation = config.data, config.federation
    if settings.partitioner == "files":
        sources = client_sources(settings.source)
        found = {client: load_examples(path, settings=settings, tell=tell) for client, path in sources.items()}
        if federation.num_clients not in (None, len(found)):
            raise ConfigError(
                f"federation.num_clients is {federation.num_clients}, but {settings.source} holds data for {len(found)}"
            )
        return found, None
    sources_read = sources_by_client(settings.source).values()
    pooled = [example for path in sources_read for example in load_examples(path, settings=settings, tell=tell)]
    manifest = partition(pooled, settings, federation)
    return {client: [pooled[index] for index in held] for client, held in manifest.clients.items()}, manifest


def heldout_examples(settings: DataSettings, tell: Tell = ignore) -> dict[str, list[Example]]:
    """Domain → examples to score."""
    return _split_examples(settings, settings.heldout, tell)


def validation_examples(config: Config, tell: Tell = ignore) -> dict[str, list[Example]]:
    """Domain → examples to choose a round on; none where no setting asks for that."""
    return _split_examples(config.data, config.data.validation, tell) if config.federation.validates else {}


def _split_examples(settings: DataSettings, name: str | None, tell: Tell) -> dict[str, list[Example]]:
    """Domain → examples of a split beside the training data, or of files of their own."""
    return {
        domain: load_examples(source, split, settings, tell)
        for domain, (source, split) in _split_sources(settings, name).items()
    }


def _split_sources(settings: DataSettings, name: str | None) -> dict[str, tuple[Path | str, str]]:
    """Domain → source and split."""
    if name is None:
        return {}
    if "{client}" in name or Path(name).is_absolute() or Path(name).exists():
        return {domain: (path, "train") for domain, path in sources_by_client(name).items()}
    return {domain: (path, name) for domain, path in sources_by_client(settings.source).items()}


def check_unseen(settings: DataSettings) -> None:
    """Raises ConfigError where a file is both trained on and scored on."""
    sources = (client_sources if settings.partitioner == "files" else sources_by_client)(settings.source)
    trained = {file.resolve() for source in sources.values() for file in locate_files(source)}
    for source, split in _split_sources(settings, settings.heldout).values():
        for file in locate_files(source, split):
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
