"""`fedloom init`: a settings file with every key, and in it what the user has already."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from fedloom.cli.options import say
from fedloom.errors import ConfigError

CLIENTS = 2
"""Among how many one file is split: the fewest that make a federation. The user sets another number in the file."""


def init(
    path: Annotated[Path, typer.Argument(help="File to write.")] = Path("fedloom.toml"),
    model: Annotated[str, typer.Option(help="Base model: a folder, or a name on the Hub.")] = "",
    data: Annotated[
        list[str] | None,
        typer.Option(help="A folder with a file or folder a site, or a site's own file or folder; repeatable."),
    ] = None,
    heldout: Annotated[str, typer.Option(help="Examples to score on: a file, or the name of a split.")] = "",
) -> None:
    """Write a settings file with every key, its meaning and its default, and with what you name filled in."""
    from fedloom.records.configfile import settings_template

    if path.exists():
        raise ConfigError(f"{path} exists already; give another name: fedloom init other.toml")
    chosen: dict[str, object] = {"model.path": _located("--model", model, path)} if model else {}
    chosen |= _sources(data or [], path)
    if heldout:
        chosen["data.heldout"] = _relative(Path(heldout), path) if Path(heldout).exists() else heldout
    path.write_text(settings_template(chosen), encoding="utf-8")
    say(f"wrote {path}; next: fedloom {'preview' if data else 'run'} {path}")


def _sources(given: Sequence[str], file: Path) -> Mapping[str, object]:
    """What --data says, as settings."""
    places = [_located("--data", name, file) for name in given]
    if not places:
        return {}
    if len(places) > 1:
        names = [_site_name(name) for name in given]
        if len(set(names)) < len(names):
            raise ConfigError(
                f"--data: {' and '.join(given)} would be sites of the same name; rename a file, or name the sites "
                "yourself, in data.sources"
            )
        return {"data.source": None, "data.sources": dict(zip(names, places, strict=True))}
    if Path(given[0]).is_file():
        return {"data.source": places[0], "data.partitioner": "iid", "federation.num_clients": CLIENTS}
    return {"data.source": places[0]}


def _site_name(name: str) -> str:
    """A file's name without its endings, a folder's own, a Hub data set's second part."""
    place = Path(name)
    return (place.name.partition(".")[0] if place.is_file() else place.name) or place.resolve().name


def _located(option: str, name: str, file: Path) -> str:
    """A path as the settings file has to say it; a name on the Hub as it is. Raises ConfigError where there is none."""
    if Path(name).exists():
        return _relative(Path(name), file)
    owner, _, rest = name.partition("/")
    # In a folder that is here it would be a file, and it is not there.
    if owner and rest and "/" not in rest and not owner.startswith((".", "~")) and not Path(owner).is_dir():
        return name
    raise ConfigError(f"{option} {name}: no such file or folder, and no name on the Hub, which is owner/name")


def _relative(path: Path, file: Path) -> str:
    """A path from the folder of the settings file, so that both can be moved together; an absolute one stays."""
    if path.is_absolute():
        return str(path)
    found = os.path.relpath(path, file.parent)
    return found if found.startswith("..") else os.path.join(".", found)
