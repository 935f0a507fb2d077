"""The model and the examples of a job at a site: its own, or around its own trainer."""

from __future__ import annotations

import logging

from fedloom.errors import SiteError
from fedloom.model.identity import base_digest
from fedloom.model.patch import PatchedTrainer
from fedloom.model.shared_base import SharedBase
from fedloom.model.sources import load_examples
from fedloom.records.config import Config
from fedloom.site.config import SiteConfig
from fedloom.workspace.assemble import Setup, build_setup, build_setup_around

log = logging.getLogger("fedloom.worker")


def build_own(site: SiteConfig, shared: SharedBase, config: Config) -> Setup:
    """The base model with this site's examples; of the other sites only the ranks are of interest here."""
    mine = load_examples(site.data, settings=site.reading(), tell=log.warning)
    names = sorted(config.federation.participants or ())
    texts = {name: mine if name == site.name else [] for name in names}
    setup = build_setup(config, texts, {}, load=shared)
    for text in setup.warnings():
        log.warning(text)
    return setup


def build_around_trainer(site: SiteConfig, trainer: PatchedTrainer, base: str, config: Config) -> Setup:
    """The job around the model of the site's own trainer. base: digest of the site's base model.

    Raises SiteError where the trainer's is another one.
    """
    folder = trainer.base_folder
    if folder is not None and base_digest(folder) != base:
        raise SiteError(
            f"the trainer's model was loaded from {folder}, which is not the base model in {site.model}: "
            "load it from there"
        )
    if folder is None:
        log.warning("the trainer's model came from no folder: nobody checks that it is %s", site.model)
    return build_setup_around(config, trainer.model, sorted(config.federation.participants or ()))
