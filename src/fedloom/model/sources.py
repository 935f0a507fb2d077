"""Where examples are: a file, a folder with a split in one file or in several, or a data set on the Hub."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from fedloom.errors import DataError
from fedloom.model.datafiles import READERS, iterate_rows, kind_of, stem_of
from fedloom.model.examples import Example, UndesiredError, read_row
from fedloom.records.config import DataSettings

_SAVED, _SAVED_SPLITS = "state.json", "dataset_dict.json"
"""Files by which a folder of datasets' `save_to_disk` is known: of a Dataset, of a DatasetDict."""

Tell: TypeAlias = Callable[[str], object]
"""Takes a sentence that the user should read before the first round."""


def ignore(note: str) -> None:
    """For who wants the examples only."""


@dataclass(slots=True)
class Reading:
    """What was read of a source. skipped: rows left out because they are broken; first: where the first was and why.

    undesired: rows left out because their answer is marked as bad; preferences: rows with an answer that is not used.
    """

    rows: int = 0
    skipped: int = 0
    first: str = ""
    undesired: int = 0
    preferences: int = 0


def load_examples(
    source: str | Path,
    split: str = "train",
    settings: DataSettings | None = None,
    tell: Tell = ignore,
) -> list[Example]:
    """All examples of a file, of a folder's `split` (`split_files`), or of a Hub data set, named owner/name.

    settings: `columns`, `skip_bad_rows` and, for the Hub, `subset`; its other keys are not read. tell: called with a
    sentence about rows that were left out or not wholly used.
    Raises DataError that names file and line where something is missing, empty or of no known form.
    """
    settings = settings or DataSettings()
    files = locate_files(source, split)
    if files:
        tables = [(str(path), iterate_rows(path)) for path in files]
        name = str(files[0] if len(files) == 1 else source)
    else:
        name = str(source)
        tables = [(name, _hub_rows(name, split, settings.subset))]
    examples: list[Example] = []
    readings: list[Reading] = []
    for place, rows in tables:
        readings.append(Reading())
        examples += _read(place, rows, settings, readings[-1])
        if readings[-1].skipped:
            tell(f"{place}: {_skipped(readings[-1])}, as data.skip_bad_rows says")
    if not examples:
        what = name if files else f"Hub data set {name}, split {split!r},"
        reasons = [*(_skipped(reading) for reading in readings if reading.skipped), *_notes(readings)]
        raise DataError(f"{what} holds no examples{': ' if reasons else ''}{''.join(reasons[:1])}")
    for note in _notes(readings):
        tell(f"{name}: {note}")
    return examples


def _read(name: str, rows: Iterable[tuple[str, object]], settings: DataSettings, reading: Reading) -> Iterator[Example]:
    for place, row in rows:
        reading.rows += 1
        try:
            if isinstance(row, DataError):
                raise row
            if not isinstance(row, dict):
                raise DataError(f"a {type(row).__name__}, expected an object with named columns")
            example, form = read_row(row, settings.columns)
        except UndesiredError:
            reading.undesired += 1
        except DataError as error:
            if not settings.skip_bad_rows:
                raise DataError(f"{name}, {place}: {error}") from None
            reading.first = reading.first or f"{place}: {error}"
            reading.skipped += 1
        else:
            reading.preferences += form.preference
            yield example


def _skipped(reading: Reading) -> str:
    return f"{reading.skipped:,} of {reading.rows:,} rows left out; the first, {reading.first}"


def _notes(readings: list[Reading]) -> Iterator[str]:
    undesired = sum(reading.undesired for reading in readings)
    preferences = sum(reading.preferences for reading in readings)
    if undesired:
        yield f"{undesired:,} rows left out whose label is false: their answers are marked as not to be given"
    if preferences:
        yield f"{preferences:,} rows are preferences: what is chosen is learnt, the rejected answers are not used"


def locate_files(source: str | Path, split: str = "train") -> list[Path]:
    """The files that hold a split of a source; none for a name on the Hub. Raises DataError where nothing is there."""
    path = Path(source)
    if path.is_file():
        if split != "train":
            raise DataError(f"{path} is one file and has no split {split!r}: name a file of held-out examples")
        return [path]
    if path.is_dir():
        return split_files(path, split)
    if re.fullmatch(r"[\w-]+/[\w.-]+", str(source)) and kind_of(path) is None:
        return []
    raise DataError(
        f"no data at {source}: expected a file ({', '.join(READERS)}), a folder, or a Hub name such as owner/name"
    )


def split_files(folder: Path, split: str) -> list[Path]:
    """The files of a folder that hold a split, one after the other.

    That is <split> with the ending of a kind that is read (or a file of that very name), its shards
    <split>-00000-of-00002 and so on, or what datasets' `save_to_disk` wrote. Raises DataError if there is none, or if
    a shard is missing.
    """
    if (folder / _SAVED_SPLITS).is_file():
        splits = _saved_list(folder / _SAVED_SPLITS, "splits")
        if split not in splits:
            raise DataError(f"{folder} holds no split {split!r}: it has {', '.join(map(str, splits))}")
        return _saved_files(folder / split)
    if (folder / _SAVED).is_file():
        if split != "train":
            raise DataError(f"{folder} is one data set (save_to_disk) and has no split {split!r}")
        return _saved_files(folder)
    if (folder / split).is_file():
        return [folder / split]
    held = sorted(path for path in folder.iterdir() if path.is_file())
    for ending in READERS:
        for path in held:
            if kind_of(path) == ending and stem_of(path) == split:
                return [path]
    return _shards(held, split) or _refuse(folder, split)


def _refuse(folder: Path, split: str) -> list[Path]:
    held = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise DataError(
        f"{folder} holds no split {split!r}: expected {split}.jsonl, or another kind of file ({', '.join(READERS)}), "
        f"found {held}"
    )


def _shards(held: list[Path], split: str) -> list[Path]:
    """Its shards in order, of the first kind that there is. Raises DataError where one is missing."""
    for ending in READERS:
        found: dict[tuple[int, int], Path] = {}
        for path in held:
            name = re.fullmatch(rf"{re.escape(split)}-(\d+)-of-(\d+)(-[0-9a-f]+)?", stem_of(path))
            if name and kind_of(path) == ending:
                found[int(name[1]), int(name[2])] = path
        if found:
            counts = {count for _, count in found}
            if len(counts) > 1:
                raise DataError(f"{held[0].parent} holds shards of {split!r} of {sorted(counts)}: expected one number")
            last = next(iter(counts))
            for index in range(last):
                if (index, last) not in found:
                    missing = f"{split}-{index:05d}-of-{last:05d}{ending}"
                    raise DataError(f"{held[0].parent}: {missing} is missing, of {last} shards {len(found)} are there")
            return [found[index, last] for index in range(last)]
    return []


def _saved_files(folder: Path) -> list[Path]:
    """The Arrow files of a Dataset that was saved."""
    try:
        files = [folder / str(entry["filename"]) for entry in _saved_list(folder / _SAVED, "_data_files")]
    except (TypeError, KeyError):
        raise DataError(f"{folder / _SAVED} is not what datasets' save_to_disk writes: no names of files") from None
    for path in files:
        if not path.is_file():
            raise DataError(f"{path} is missing, which {folder / _SAVED} names")
    return files


def _saved_list(path: Path, key: str) -> list[Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not what datasets' save_to_disk writes ({type(error).__name__}: {error})") from None
    if not isinstance(found, list):
        raise DataError(f"{path} is not what datasets' save_to_disk writes: {key} is no list")
    return found


def client_sources(source: str | Path) -> dict[str, Path]:
    """Client → its file or folder, where every client has one.

    `source` is a folder (each sub-folder, else each data file in it, is a client), or a path with {client} in it.
    """
    text = str(source)
    clients = _named_clients(text) if "{client}" in text else _clients_of_folder(Path(source))
    if not clients:
        raise DataError(f"{source}: no client's file or folder found there")
    return dict(sorted(clients.items()))


def _named_clients(source: str) -> dict[str, Path]:
    head, tail = source.split("{client}", 1)
    above, start = (Path(head), "") if head.endswith("/") else (Path(head).parent, Path(head).name)
    inner, _, below = tail.partition("/")
    names = [path.name for path in (above.iterdir() if above.is_dir() else ())]
    fits = [name for name in names if name.startswith(start) and name.endswith(inner) and not name.startswith(".")]
    clients = {name[len(start) : len(name) - len(inner)]: above / name / below for name in fits}
    return {name: path for name, path in clients.items() if name and path.exists()}


def _clients_of_folder(folder: Path) -> dict[str, Path]:
    saved = any((folder / name).is_file() for name in (_SAVED, _SAVED_SPLITS))
    if saved or not folder.is_dir():
        what = "one data set (save_to_disk)" if saved else "one file" if folder.is_file() else "not a folder"
        raise DataError(
            f"{folder} is {what}: expected a folder with a sub-folder or a data file for each client; "
            "to split one source among clients, set data.partitioner (iid, dirichlet, shards or natural)"
        )
    found = [path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")]
    if found:
        return {path.name: path for path in found}
    clients: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_file() and kind_of(path):
            name = stem_of(path)
            if name in clients:
                raise DataError(f"{folder}: client {name!r} has two files, {clients[name].name} and {path.name}")
            clients[name] = path
    return clients


def _hub_rows(name: str, split: str, subset: str | None) -> Iterator[tuple[str, object]]:
    try:
        import datasets
    except ImportError:
        raise DataError(f"no file or folder {name}; to read it from the Hub: pip install 'fedloom[hub]'") from None
    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except Exception as error:  # the library lets through whatever its network stack raises
        lines = str(error).splitlines() or [type(error).__name__]
        several = lines[0].startswith("Config name is missing")  # the next line has them all
        reason = " ".join([*lines[:2], "Set data.subset to one of them."] if several else lines[:1])
        raise DataError(
            f"no file or folder {name}, and no split {split!r} of a Hub data set of that name ({reason})"
        ) from None
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", dict(row)
