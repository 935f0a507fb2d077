"""Every key of [policy] can be found by who writes a SITE.toml."""

from pathlib import Path

import pytest

import fedloom
from fedloom.site.config import SiteConfig
from fedloom.site.rules import Policy

PACKAGE = Path(fedloom.__file__).parent
TEMPLATE = (PACKAGE / "deploy" / "templates" / "SITE.toml").read_text(encoding="utf-8")
PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("key", sorted(set(Policy.model_fields) - {"privacy"}))
def test_every_rule_is_in_the_template_and_on_the_page(key):
    assert f"{key} = " in TEMPLATE and f"`{key}" in PAGE


def test_a_site_says_for_itself_how_many_threads_it_uses():
    assert "# threads = " in TEMPLATE and SiteConfig.model_fields["threads"].default is None
