"""Copies of a site, of the server or of a whole federation's folder, and back.

An archive is a tar file: files/ (the folder), states/NAME/ (a site's state folder, where it lies elsewhere), runs/NAME/
(folders of runs), and at its end backup.json with the digest of every file. The SuperLink's database is copied through
SQLite while it is in use. Base model and data are not copied.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import os
import shutil
import sqlite3
import stat
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import IO

from pydantic import ValidationError

from fedloom.deploy import bundle
from fedloom.deploy.roster import server_folder
from fedloom.deploy.versions import installed
from fedloom.errors import ConfigError
from fedloom.records.config import Section
from fedloom.site.config import SiteConfig, load_site_config

MANIFEST = "backup.json"
DATABASE = "superlink.db"
_BESIDE_DATABASE = (f"{DATABASE}-wal", f"{DATABASE}-shm", f"{DATABASE}-journal")
_PIECE = 2**20


class Manifest(Section):
    """What stands in backup.json. states: name in the archive → where that state folder lay."""

    format: int
    fedloom: str
    made: str
    sites: list[str]
    states: dict[str, str]
    digests: dict[str, str]


@dataclass(slots=True)
class BackedUp:
    """What a copy holds. left_out: what is neither a file nor a folder (links, sockets)."""

    files: int = 0
    bytes: int = 0
    left_out: list[Path] = field(default_factory=list)


def back_up(folder: Path, archive: Path, runs: Sequence[Path] = (), *, while_running: bool = False) -> BackedUp:
    """Write the archive, for its owner alone.

    Raises ConfigError where the folder is of no site and no server, the archive exists, or a site's worker is running
    (unless `while_running`: what it writes meanwhile may then be missing in the copy).
    """
    sites = _sites(folder)
    states = {f"states/{site.name}": Path(site.state) for site in sites if not _within(Path(site.state), folder)}
    trees = {"files": folder, **states, **_named_runs(runs)}
    partial = archive.with_name(archive.name + ".partial")
    if archive.exists():
        raise ConfigError(f"{archive} exists already; nothing is written over")
    with ExitStack() as held:
        if not while_running:
            for site in sites:
                held.enter_context(_stopped(site))
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file, tarfile.open(fileobj=file, mode="w") as tar:
                done = _write(tar, trees, partial, [site.name for site in sites])
                tar.close()
                os.fsync(file.fileno())
            os.replace(partial, archive)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    return done


def restore(folder: Path, archive: Path) -> list[str]:
    """Put an archive's files where they were, the folder itself at `folder`; returns what is to be said about it.

    Raises ConfigError where something is there already, or the archive is no such copy or was changed; then nothing
    is left behind.
    """
    partial = folder.with_name(folder.name + ".partial")
    try:
        with tarfile.open(archive, "r:") as tar:
            manifest = _manifest(tar, archive)
            targets = {"files": folder, **{name: Path(where) for name, where in manifest.states.items()}}
            for target in (partial, *targets.values()):
                if target.exists() and (not target.is_dir() or any(target.iterdir())):
                    raise ConfigError(f"{target} exists already; nothing is written over")
            partial.mkdir(parents=True, exist_ok=True, mode=0o700)
            try:
                _extract(tar, partial, manifest.digests, archive)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
    except (tarfile.TarError, OSError) as error:
        raise ConfigError(f"{archive} cannot be put back: {error}") from None
    said = []
    for name, target in targets.items():
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.exists():
            target.rmdir()  # it is empty
        shutil.move(partial / name, target)
        said.append(f"wrote {target}")
    if (partial / "runs").exists():
        shutil.move(partial / "runs", folder / "runs")
        said.append(f"wrote {folder / 'runs'}: move each run back to where it was before it goes on")
    shutil.rmtree(partial)
    return [*said, *_warnings(manifest)]


def _warnings(manifest: Manifest) -> list[str]:
    said = ["give the files back to their users (docs/deploy.md), and let the doctor look at it"]
    if manifest.sites:
        named = ", ".join(manifest.sites)
        said.append(
            f"what has left {named} since {manifest.made} is not in its record: its noise is not counted either"
        )
    return said


def _sites(folder: Path) -> list[SiteConfig]:
    """The sites whose files lie in the folder. Raises ConfigError where it is of no site, server or federation."""
    own = folder / "SITE.toml"
    if own.is_file():
        return [load_site_config(own)]
    server_folder(folder)
    return [load_site_config(path) for path in sorted(folder.glob("sites/*/SITE.toml"))]


def _named_runs(runs: Sequence[Path]) -> dict[str, Path]:
    for run in runs:
        if not (run / "ledger.jsonl").is_file():
            raise ConfigError(f"{run} is no run's folder: it has no ledger.jsonl")
    named = {f"runs/{run.resolve().name}": run for run in runs}
    if len(named) != len(runs):
        raise ConfigError("two runs have the same name: copy one of them by itself")
    return named


@contextmanager
def _stopped(site: SiteConfig) -> Iterator[None]:
    """Keep a site's worker from starting. Raises ConfigError where one is running."""
    lock = Path(site.state) / ".lock"
    if not lock.parent.is_dir():
        yield
        return
    with lock.open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"the worker of site {site.name} is running: stop it first, or --while-running") from None
        yield


def _write(tar: tarfile.TarFile, trees: Mapping[str, Path], partial: Path, sites: Sequence[str]) -> BackedUp:
    done, digests = BackedUp(), {}
    for name, top in trees.items():
        for path, inside in _walk(top, name):
            mode = path.lstat().st_mode
            if partial.exists() and path.absolute() == partial.absolute():
                continue
            if stat.S_ISDIR(mode):
                tar.add(path, inside, recursive=False)
            elif not stat.S_ISREG(mode):
                done.left_out.append(path)
            elif digest := _add(tar, path, inside, partial.parent):
                digests[inside] = digest
                done.files, done.bytes = done.files + 1, done.bytes + tar.getmember(inside).size
    states = {name: str(top.absolute()) for name, top in trees.items() if name.startswith("states/")}
    made = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = Manifest(
        format=1, fedloom=installed("fedloom"), made=made, sites=list(sites), states=states, digests=digests
    )
    content = json.dumps(manifest.model_dump(), indent=1).encode()
    told = tarfile.TarInfo(MANIFEST)
    told.size, told.mode = len(content), 0o600
    tar.addfile(told, io.BytesIO(content))
    return done


def _walk(top: Path, name: str) -> Iterator[tuple[Path, str]]:
    """(path, name in the archive) of all that a folder holds, the record of what left last: it must miss no payload
    that a job's state knows of.
    """
    yield top, name
    # Bundles, and what one has installed at a site, are some GB that can be made again.
    again = {bundle.FOLDER, bundle.VENV if (top / bundle.VENV / bundle.MARK).is_file() else ""}
    found = [Path(root) / entry for root, folders, files in os.walk(top) for entry in (*folders, *files)]
    for path in sorted(found, key=lambda path: ("audit" in path.relative_to(top).parts, path)):
        if path.relative_to(top).parts[0] not in again and path.name not in (".lock", *_BESIDE_DATABASE):
            yield path, f"{name}/{path.relative_to(top).as_posix()}"


def _add(tar: tarfile.TarFile, path: Path, inside: str, scratch: Path) -> str:
    """Put a file into the archive; its SHA-256, or "" where it is gone meanwhile."""
    with ExitStack() as held:
        try:
            if path.name == DATABASE:
                # Beside the archive, where there is room for it.
                copied = Path(held.enter_context(tempfile.TemporaryDirectory(dir=scratch))) / DATABASE
                _copy_database(path, copied)
                source: IO[bytes] = held.enter_context(copied.open("rb"))
            else:
                source = held.enter_context(path.open("rb"))
        except FileNotFoundError:
            return ""
        told = tar.gettarinfo(arcname=inside, fileobj=source)
        told.mode = path.stat().st_mode & 0o777
        hashed = _Hashed(source)
        tar.addfile(told, hashed)
    return hashed.digest.hexdigest()


class _Hashed(io.RawIOBase):
    """Reads a file and digests what was read."""

    def __init__(self, source: IO[bytes]) -> None:
        self.source, self.digest = source, hashlib.sha256()

    def read(self, size: int = -1) -> bytes:
        piece = self.source.read(size)
        self.digest.update(piece)
        return piece


def _copy_database(source: Path, copy: Path) -> None:
    """A database as it is at one moment, whoever writes to it meanwhile."""
    try:
        with (
            closing(sqlite3.connect(f"file:{source}?mode=ro", uri=True)) as used,
            closing(sqlite3.connect(copy)) as made,
        ):
            used.backup(made)
    except sqlite3.Error as error:
        raise ConfigError(f"{source} cannot be copied: {error}") from None


def _manifest(tar: tarfile.TarFile, archive: Path) -> Manifest:
    try:
        found = tar.extractfile(MANIFEST)
        manifest = Manifest.model_validate_json(found.read(64 * _PIECE) if found else b"")
    except (KeyError, ValidationError):
        raise ConfigError(f"{archive} is no copy that `fedloom federation backup` made, or is not whole") from None
    if manifest.format != 1:
        raise ConfigError(f"{archive} was made by fedloom {manifest.fedloom}, in a form that this one does not know")
    return manifest


def _extract(tar: tarfile.TarFile, into: Path, digests: Mapping[str, str], archive: Path) -> None:
    """Write folders and files, with their modes. Raises ConfigError for any other member, or another digest."""
    missing = set(digests)
    for member in tar:
        parts = PurePosixPath(member.name).parts
        if member.name == MANIFEST:
            continue
        if (
            not parts
            or parts[0] not in ("files", "states", "runs")
            or ".." in parts
            or member.name not in digests
            and not member.isdir()
        ):
            raise ConfigError(f"{archive} holds {member.name!r}, which no copy has")
        target = into.joinpath(*parts)
        if member.isdir():
            target.mkdir(parents=True, exist_ok=True)
            target.chmod(member.mode & 0o777 | 0o700)
            continue
        content = tar.extractfile(member) if member.isreg() else None
        if content is None:
            raise ConfigError(f"{archive} holds {member.name!r}, which no copy has")
        if _copy_out(content, target, member.mode & 0o777) != digests[member.name]:
            raise ConfigError(f"{archive}: {member.name} was changed, or is not whole")
        missing.discard(member.name)
    if missing:
        raise ConfigError(f"{archive} lacks {min(missing)}")


def _copy_out(content: IO[bytes], target: Path, mode: int) -> str:
    """Write a new file that has this mode from its first byte on; its SHA-256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode | 0o600), "wb") as file:
        while piece := content.read(_PIECE):
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


def _within(path: Path, folder: Path) -> bool:
    return path.absolute().is_relative_to(folder.absolute())
