"""Writes docs/settings.md: every setting of a run and of a site with its default and meaning, read from the records.

python -m scripts.make_settings_page      # or: make pages
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from fedloom.records.config import Config
from fedloom.site.config import NodeSettings, SiteConfig
from fedloom.site.policy import Policy
from fedloom.site.privacy import Privacy

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
OPENING = """<!-- Written by scripts/make_settings_page.py from the code: `make pages`. -->

# Settings

Every key of a settings file and of a `SITE.toml`. `fedloom init my.toml` writes the first as a file to fill in. On the
command line a key is `--set training.learning_rate=5e-4`, from Python `settings={"training.learning_rate": 5e-4}`.
`null` unsets a key. The settings of a method stand on [its page](methods/index.md).
"""
SITE = """
## SITE.toml

What one site lends, and on which conditions. Paths count from the folder of the file. A policy that is not set does not
limit anything; [What a site decides](deploy.md#what-a-site-decides) explains it.
"""


def page() -> str:
    """The whole page."""
    parts = [OPENING]
    for name, field in Config.model_fields.items():
        if name != "clients" and isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            parts.append(section(f"[{name}]", field.annotation))
    parts.append(
        "\n## [clients.NAME]\n\nWhat one client has otherwise than `[lora]` and `[training]` say, as in "
        "`[clients.lab]` with `r = 4`: "
        + ", ".join(f"`{key}`" for key in Config.model_fields["clients"].annotation.__args__[1].model_fields)
        + ".\n"
    )
    parts += [
        SITE,
        section("(top)", SiteConfig),
        section("[node]", NodeSettings),
        section("[policy]", Policy),
        section("[policy.privacy]", Privacy),
    ]
    return "".join(parts)


def section(title: str, record: type[BaseModel]) -> str:
    """One table of the file."""
    rows = [row(key, field) for key, field in record.model_fields.items() if key not in ("node", "policy", "privacy")]
    head = "| key | default | meaning |\n| --- | --- | --- |\n"
    summary = (inspect.getdoc(record) or "").partition("\n\n")[0].replace("\n", " ")
    return f"\n## {title}\n\n{summary}\n\n{head}{''.join(rows)}"


def row(key: str, field: FieldInfo) -> str:
    """One key: its default or an example, and its meaning."""
    if field.default is PydanticUndefined:
        shown = "needed"
    elif field.default is None:
        example = f", such as {value(field.examples[0])}" if field.examples else ""
        shown = f"–{example}"
    else:
        shown = value(field.default)
    return f"| `{key}` | {shown} | {escaped(field.description or '')} |\n"


def escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return text.replace("|", "\\|").replace("*", "\\*")


def value(found: object) -> str:
    """A value as TOML writes it."""
    return f"`{json.dumps(found, ensure_ascii=False)}`"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
