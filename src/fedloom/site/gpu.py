"""Which of a machine's GPUs a site uses: `device = "cuda:1"` in SITE.toml."""

from __future__ import annotations

import os
import re

from fedloom.errors import ConfigError
from fedloom.site.config import SiteConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"


def claim_gpu(site: SiteConfig) -> SiteConfig:
    """Let this process see one GPU, where the site names one by its number; the site then says "cuda".

    transformers' Trainer takes the first GPU that it sees, so the process must see that one alone. To be called before
    anything has used CUDA. Raises ConfigError where the environment shows fewer GPUs.
    """
    numbered = re.fullmatch(r"cuda:(\d+)", site.device)
    if not numbered:
        return site
    number = int(numbered[1])
    shown = os.environ.get(VISIBLE)
    if shown is not None:
        names = [name.strip() for name in shown.split(",") if name.strip()]
        if number >= len(names):
            raise ConfigError(f"device is {site.device!r}, but {VISIBLE}={shown!r} shows {len(names)} GPUs")
        os.environ[VISIBLE] = names[number]
    else:
        os.environ[VISIBLE] = str(number)
    return site.model_copy(update={"device": "cuda"})
