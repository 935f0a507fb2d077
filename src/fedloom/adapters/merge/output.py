"""An output folder that is either complete or absent."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import mkdtemp

from fedloom.errors import ConfigError

MARKS = ("adapter_config.json", "config.json")
"""Files by which a folder is known as an adapter or a model."""


def check_free(out: Path, inputs: Iterable[Path], *, force: bool) -> None:
    """Raise ConfigError where `out` is taken, or is or holds one of the folders that are read.

    With `force` an adapter or a model may be replaced, but nothing else: a mistyped path shall cost no work.
    """
    if any(out.resolve() in (folder.resolve(), *folder.resolve().parents) for folder in inputs):
        raise ConfigError(f"--out {out} is or holds one of the folders to be merged: choose another")
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    if not force:
        raise ConfigError(f"{out} exists already: choose another folder, or replace it with --force")
    if not any((out / mark).is_file() for mark in MARKS):
        raise ConfigError(f"{out} is neither an adapter nor a model, so --force does not replace it: choose another")


@contextmanager
def replace_whole(out: Path) -> Iterator[Path]:
    """A new folder beside `out` that takes the place of `out` at the end. After an error nothing of it is left."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f".{out.name}.", suffix=".partial", dir=out.parent))
    try:
        partial.chmod(0o755)
        yield partial
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
