"""`fedloom federation bundle`: all that a site needs to be set up on a machine without a network, in one folder.

DIR/bundles/NAME/
  install.sh      checks, installs and runs the doctor; knows no network
  SHA256SUMS      of every other file, as `sha256sum -c` reads it
  README.txt      what it is, which machine it is for, the base model's digest
  wheelhouse/     fedloom and all that it needs
  site/           this site's files of DIR/sites/NAME, by name: nothing else that lies there, and no other's key
  model/          the base model's files, where they were asked for
DIR/bundles/.wheels/   what pip fetched: bundles hold links to it, so that many take the room of one
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata, resources
from itertools import chain
from pathlib import Path
from string import Template

import tomli_w

from fedloom.deploy.federation import RECORD, FederationPlan, read_plan, site_file_names, write_new
from fedloom.deploy.platforms import joined
from fedloom.deploy.wheelhouse import Asked, fill_wheelhouse, unpacked_bytes
from fedloom.errors import ConfigError

FOLDER = "bundles"
SUMS = "SHA256SUMS"
VENV, MARK = "venv", ".fedloom-bundle"
"""Where a site's folder has what install.sh has installed, and the file in it that says so."""
_MODEL_FILES = ("*.json", "*.jinja", "LICENSE*", "NOTICE*", "README*")
"""Of a base model's folder, beside what its digest is of: the index of its parts, and what has to go with it."""
_VENV_BYTES = 64 * 2**20
"""An environment with pip and nothing else, and some room."""


@dataclass(frozen=True, slots=True)
class Bundle:
    """What was made. bytes: of all its files. digest: SHA-256 of SHA256SUMS, which the site compares."""

    folder: Path
    bytes: int
    digest: str


@dataclass(frozen=True, slots=True)
class _Shared:
    """What all bundles hold, and is linked. files: name in the bundle → (where it lies, SHA-256)."""

    files: Mapping[str, tuple[Path, str]]
    unpacked: int
    model_bytes: int
    model_digest: str


class _Text(Template):
    """%{name} stands for a value, so that $ keeps its meaning in a shell script."""

    delimiter = "%"


def write_bundles(folder: Path, sites: Sequence[str], asked: Asked, model: str = "") -> list[Bundle]:
    """A bundle for each site of a federation's folder; one that is there already is made anew.

    sites: names; none for all. model: folder or Hub name of the base model whose files go in, "" for none of them.
    Raises ConfigError, and leaves what is there as it is, where a site is not known, the model is not the federation's,
    or pip fails.
    """
    federation = read_plan(folder)
    places = _site_folders(folder, sites)
    files, digest = _model_files(model, federation) if model else ({}, federation.model_digest)
    store = folder / FOLDER
    for place in places:
        _check_place(store / place.name)
    if not store.exists():
        store.mkdir(mode=0o700)
    try:
        wheels = sorted(fill_wheelhouse(store / ".wheels", asked).glob("*.whl"))
        files = {**{f"wheelhouse/{wheel.name}": wheel for wheel in wheels}, **files}
        shared = _Shared(
            {name: (path, _digest(path)) for name, path in files.items()},
            unpacked_bytes(wheels),
            sum(path.stat().st_size for name, path in files.items() if name.startswith("model/")),
            digest,
        )
        return [_write_bundle(store / place.name, place, federation, asked, shared) for place in places]
    except OSError as error:
        raise ConfigError(
            f"{store} cannot be written: {error.strerror or error}; mend it, then run the same command again"
        ) from None


def _site_folders(folder: Path, sites: Sequence[str]) -> list[Path]:
    known = {path.name: path for path in sorted((folder / "sites").glob("*")) if (path / "SITE.toml").is_file()}
    for name in sites:
        if name not in known:
            raise ConfigError(
                f"{folder} has no site {name!r}, but {', '.join(known) or 'none'}: federation add makes one"
            )
    if not known:
        raise ConfigError(f"{folder} has no sites/: run it where `fedloom federation init` wrote them")
    return [known[name] for name in dict.fromkeys(sites or known)]


def _check_place(made: Path) -> None:
    """Raises ConfigError where something lies there that no bundle is."""
    if made.exists() and not ((made / SUMS).is_file() and (made / "install.sh").is_file()):
        raise ConfigError(f"{made} exists already and is no bundle; nothing is written over: move it away")


def _model_files(model: str, federation: FederationPlan) -> tuple[dict[str, Path], str]:
    """Name in the bundle → file, and the model's digest. Raises ConfigError where it is not the federation's."""
    from fedloom.model.identity import SHARED, base_digest, base_folder

    folder, digest = base_folder(model), base_digest(model)
    if federation.model_digest and digest != federation.model_digest:
        raise ConfigError(
            f"--model {model}: its digest is {digest}, the federation's {federation.model_digest}; give the model "
            "that the federation was set up with"
        )
    found = {
        f"model/{path.relative_to(folder).as_posix()}": path
        for path in chain(*map(folder.glob, (*SHARED, *_MODEL_FILES)))
    }
    files = {name: path for name, path in sorted(found.items()) if path.is_file()}
    for name in files:
        if re.search(r"[\\\x00-\x1f\x7f]", name):
            raise ConfigError(
                f"--model {model}: {name!r} is no name that a list of checksums can hold; rename the file"
            )
    return files, digest


def _write_bundle(made: Path, place: Path, federation: FederationPlan, asked: Asked, shared: _Shared) -> Bundle:
    """One site's, beside what is there, and then in its place. Where it fails, nothing of it is left."""
    partial = made.with_name(f".{made.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(mode=0o700)
    try:
        done = _fill_bundle(partial, place, federation, asked, shared)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if made.exists():
        shutil.rmtree(made)
    partial.rename(made)
    return replace(done, folder=made)


def _fill_bundle(partial: Path, place: Path, federation: FederationPlan, asked: Asked, shared: _Shared) -> Bundle:
    for name, (source, _) in shared.files.items():
        _link(source, partial / name)
    _write_site(partial / "site", place, federation, shared)
    values = _values(place, federation, asked, shared)
    write_new(partial / "install.sh", _filled("install.sh", values), 0o755)
    write_new(partial / "README.txt", _filled("README.txt", values))
    own = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    names = [path.relative_to(partial).as_posix() for path in own]
    sums = "".join(
        f"{shared.files[name][1] if name in shared.files else _digest(path)}  {name}\n"
        for name, path in zip(names, own, strict=True)
    )
    write_new(partial / SUMS, sums)
    size = sum(path.stat().st_size for path in own) + len(sums)
    return Bundle(partial, size, hashlib.sha256(sums.encode()).hexdigest())


def _write_site(into: Path, place: Path, federation: FederationPlan, shared: _Shared) -> None:
    """The site's files by name: a state, a token or data that lie there as well stay there."""
    for name in site_file_names(federation):
        source = place / name
        if not source.is_file():
            continue  # a site that made its key itself keeps it; an older init wrote fewer files
        content = source.read_bytes()
        if name == "SITE.toml" and shared.model_bytes:
            content = re.sub(rb"(?m)^model = .*$", b'model = "./model"', content, count=1)
        if name == RECORD:
            told = read_plan(place).model_copy(update={"model_digest": shared.model_digest})
            content = tomli_w.dumps(told.model_dump()).encode()
        write_new(into / name, content, 0o600 if name == "node.key" else 0o755 if name.endswith(".sh") else 0o644)


def _values(place: Path, federation: FederationPlan, asked: Asked, shared: _Shared) -> dict[str, object]:
    programs, folder = _written_paths(place, federation)
    has_key = (place / "node.key").is_file()
    kib = (shared.unpacked + _VENV_BYTES) // 1024
    return {
        "site": place.name,
        "venv": VENV,
        "mark": MARK,
        "address": federation.address,
        "folder": federation.site_folder.replace("{site}", place.name) or f"$HOME/fedloom-{place.name}",
        "targets": ";".join(f"{t.system} {t.machine} {t.least[0]} {t.least[1]} 3.{t.python}" for t in asked.targets),
        "pythons": " ".join(dict.fromkeys(f"python3.{target.python}" for target in asked.targets)),
        "words": joined(asked.targets),
        "extras": ",".join(asked.extras),
        "version": metadata.version("fedloom"),
        "kib": kib,
        "mib": kib // 1024,
        "model_kib": shared.model_bytes // 1024,
        "made_bin": programs,
        "made_folder": folder,
        "model": "  model/           the base model's files\n" if shared.model_bytes else "",
        "digest": f"digest {shared.model_digest}" if shared.model_digest else "its digest was not noted",
        "key": ", the node's private key" if has_key else "",
        "secret": "site/node.key is private: whoever has it can take part in this site's name." if has_key else "",
    }


def _written_paths(place: Path, federation: FederationPlan) -> tuple[str, str]:
    """What the site's units say of (the programs' folder, the site's folder): install.sh puts the site's own there."""
    unit = next(place / name for name in site_file_names(federation) if name.endswith("-worker.service"))
    match = re.search(r"(?m)^ExecStart=(\S+)/fedloom worker (\S+)/SITE\.toml$", unit.read_text(encoding="utf-8"))
    if match is None:
        raise ConfigError(f"{unit} was changed: its line ExecStart is not as `fedloom federation init` wrote it")
    return match[1], match[2]


def _link(source: Path, target: Path) -> None:
    """The same file under another name; a copy where the file system has no such links, or the model's is another."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _filled(name: str, values: Mapping[str, object]) -> str:
    template = resources.files("fedloom.deploy") / "templates" / "bundle" / name
    return _Text(template.read_text(encoding="utf-8")).substitute(values)
