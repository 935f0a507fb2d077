"""A site's worker from Python, with the site's own trainer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedloom.model.patch import PatchedTrainer


def serve_site(site: str | Path, train: PatchedTrainer | None = None) -> None:
    """What `fedloom worker SITE.toml` does, with `train` (`fedloom.patch(trainer)`) as the training step.

    Policy, noise, audit record and time limits hold as for fedloom's own training. The trainer's model has to be the
    base model that the file names; examples are the trainer's, and the file's `data` is not read.
    Returns when the process is told to end. Raises ConfigError for a wrong file, SiteError where another worker serves
    this site.
    """
    from fedloom.site import config, worker

    worker.serve_site(config.load_site_config(Path(site)), train)
