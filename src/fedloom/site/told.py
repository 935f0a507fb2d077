"""A run's settings as the server tells them to a site: read here, and held against what this fedloom knows."""

from __future__ import annotations

import tomllib
from functools import lru_cache

from fedloom.errors import ConfigError, UnknownKeyError, VersionError
from fedloom.methods.foreign import is_foreign
from fedloom.methods.table import build
from fedloom.records.config import Config
from fedloom.records.configfile import parse
from fedloom.records.text import to_printable
from fedloom.site.config import SiteConfig
from fedloom.site.protocol import own_release

MOST_KEPT = 8
"""Jobs whose settings are kept as they were read: more than a worker has loaded."""
MOST_TOLD = 300
"""Characters of the server's own settings that it is told back."""


def read_told(text: str, site: SiteConfig) -> Config:
    """The run's settings with the site's own model, device and threads; what the server says there means nothing.

    Raises VersionError for what this fedloom does not know: the server's own words, which it may be told. Raises
    ConfigError for what is no TOML.
    """
    config = _parse(text)
    own = {"path": site.model, "device": site.device, "adapter": None, "threads": site.threads}
    return config.model_copy(update={"model": config.model.model_copy(update=own)})


@lru_cache(maxsize=MOST_KEPT)
def _parse(text: str) -> Config:
    """The settings as they were told: the same ones come with every request of a job."""
    try:
        tree = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers of 5,000 digits and deep tables beside bad syntax
        raise ConfigError(f"the server's settings are not TOML: {error}") from None
    try:
        config = parse(tree, "the server's settings")
        if not is_foreign(config.method.name):  # to build another package's method is to run its code
            build(config.method.name, config.method.settings)
    except UnknownKeyError as error:
        raise VersionError(
            f"the server's settings have the key {to_printable(error.key, MOST_TOLD)!r}, which this site "
            f"({own_release()}) does not know: update the site, or leave the key out"
        ) from None
    except ConfigError as error:
        raise VersionError(
            f"this site ({own_release()}) does not take the server's settings: {to_printable(str(error), MOST_TOLD)}"
        ) from None
    return config
