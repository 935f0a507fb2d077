"""Every key of [policy] can be found by who writes a SITE.toml."""

from pathlib import Path

import pytest

import fedloom
from fedloom.site.config import SiteConfig
from fedloom.site.privacy import Privacy
from fedloom.site.rules import ExamplePrivacy, Policy

PACKAGE = Path(fedloom.__file__).parent
TEMPLATE = (PACKAGE / "deploy" / "templates" / "SITE.toml").read_text(encoding="utf-8")
PAGE = (Path(__file__).parents[2] / "docs" / "deploy.md").read_text(encoding="utf-8")


TABLES = {"privacy": Privacy, "example_privacy": ExamplePrivacy}


@pytest.mark.parametrize("key", sorted(set(Policy.model_fields) - set(TABLES)))
def test_every_rule_is_in_the_template_and_on_the_page(key):
    assert f"{key} = " in TEMPLATE and f"`{key}" in PAGE


def test_tables_of_rules_are_in_the_template():
    for name, table in TABLES.items():
        text = TEMPLATE.partition(f"# [policy.{name}]\n")[2]
        assert all(f"# {key} = " in text for key in table.model_fields)


def test_a_site_says_for_itself_how_many_threads_it_uses():
    assert "# threads = " in TEMPLATE and SiteConfig.model_fields["threads"].default is None
