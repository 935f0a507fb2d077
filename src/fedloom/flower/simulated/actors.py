"""The sites of a simulation, as Ray's processes play them: any process may be any site, message by message.

What a site remembers is on disk alone (`site.store`), and read anew for every message; model and examples are loaded
once in a process, for all sites.
"""

from __future__ import annotations

import fcntl
import logging
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from fedloom.flower.simulated.cast import Cast
from fedloom.records.configfile import dump, parse
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.protocol import Parcel
from fedloom.site.rules import Policy
from fedloom.workspace.assemble import Setup, build_setup
from fedloom.workspace.data import client_examples
from fedloom.workspace.participants import select_participants

log = logging.getLogger("fedloom.worker")


def ask_site(cast: Cast, name: str, parcel: Parcel) -> Parcel:
    """A site's reply. Who asks while another process is being the same site waits for its turn."""
    desk = _desk(cast, name)
    with _locked(Path(desk.site.state)):
        _log_to(Path(cast.folder) / "worker.log")
        try:
            return desk.answer(parcel)
        finally:
            desk.close()


def site_config(cast: Cast, name: str) -> SiteConfig:
    """What the site would say in its SITE.toml. Raises pydantic's ValidationError where the name is none for a site."""
    return SiteConfig(
        name=name,
        model=cast.model,
        data="",
        device=cast.device,
        threads=parse(tomllib.loads(cast.settings), "the run's settings").model.threads,
        state=str(Path(cast.folder) / name),
        policy=Policy(scrub_errors=False, order="run"),
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def _log_to(path: Path) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(logging.Formatter("%(asctime)s %(process)d %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)


@cache
def _desk(cast: Cast, name: str) -> Desk:
    return Desk(site_config(cast, name), lambda config: load_everybody(dump(config)))


@cache
def load_everybody(settings: str) -> Setup:
    """Base model and examples of all sites, for settings as TOML."""
    config = parse(tomllib.loads(settings), "the run's settings")
    texts, _ = client_examples(config, log.warning)
    setup = build_setup(config, select_participants(texts, config.federation.participants), {})
    for text in setup.warnings():
        log.warning(text)
    return setup
