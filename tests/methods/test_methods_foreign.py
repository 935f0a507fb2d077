"""Methods of other packages: called by name, checked as fedloom's own are, and never imported by a site unasked."""

from __future__ import annotations

import sys

import pytest

import fedloom
from fedloom.errors import ConfigError, PolicyRefusal
from fedloom.methods.method import Method
from fedloom.methods.table import METHODS, build, method_options
from fedloom.records.config import Config
from fedloom.records.configfile import dump
from fedloom.site.config import SiteConfig
from fedloom.site.desk import Desk
from fedloom.site.policy import Policy, Spending, check_job, check_method_allowed
from fedloom.site.protocol import Request
from fedloom.studies.compare import expand_variant
from fedloom.wire import read_header
from toy import Federation, job

HALVES = """
from fedloom.methods.table import build
from fedloom.methods.method import Method, replace

def halves(*, keep: float = 0.5, needed: int = 3) -> Method:
    return replace(build("fed-dare", {"sparsity": 1 - keep}), name="fedit")

def strict(*, must: int) -> Method:
    return build("fedit")

def loose(**settings: float) -> Method:
    return build("fedit")

def nothing(*, keep: float = 0.5):
    return keep

def unreadable(*, keep: "Nowhere" = 0.5):
    return build("fedit")

number = 3
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "own_methods").mkdir()
    (tmp_path / "own_methods" / "__init__.py").touch()
    (tmp_path / "own_methods" / "halves.py").write_text(HALVES)
    (tmp_path / "own_methods" / "broken.py").write_text("1 / 0")
    (tmp_path / "own_methods" / "lacking.py").write_text("import no_such_library")
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "own_methods"]:
        del sys.modules[name]


def test_a_method_of_another_package_plays_under_its_whole_name(package):
    name = "own_methods.halves:halves"
    federation = Federation(job(build(name, {"keep": 0.25})))
    federation.play()
    twin = Federation(job(build("fed-dare", {"sparsity": 0.75})))
    twin.play()
    assert read_header(federation.broadcasts[0]).method == name  # not "fedit", as its builder would have it
    assert federation.server.adapter["layers.1.down"].B.equal(twin.server.adapter["layers.1.down"].B)
    assert method_options(name) == {"keep": 0.5, "needed": 3}
    assert build(name, {"server_optimizer": "fedadam"}).facts.keeps == "server: moments of fedadam"


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("nowhere_at_all.halves:halves", {}, r"there is no module 'nowhere_at_all'.*PYTHONPATH"),
        ("own_methods.halvse:halves", {}, r"there is no module 'own_methods.halvse'"),
        ("own_methods.lacking:halves", {}, r"its module needs 'no_such_library', which is missing"),
        ("own_methods.broken:halves", {}, r"importing own_methods.broken failed: ZeroDivisionError: division by zero"),
        ("own_methods.halves:havles", {}, r"has no 'havles'; did you mean 'halves'\?"),
        ("own_methods.halves:number", {}, r"number is not a function"),
        ("own_methods.halves:loose", {}, r"loose takes \*settings: give every setting a name"),
        ("own_methods.halves:strict", {}, r"method.must is missing"),
        ("own_methods.halves:nothing", {}, r"returns float, not a Method"),
        ("own_methods.halves:unreadable", {}, r"the types of unreadable's arguments cannot be read: .*Nowhere"),
        ("own_methods.halves:halves", {"kep": 0.1}, r"key 'kep' is unknown; did you mean 'keep'\?"),
        ("own_methods.halves:halves", {"keep": "much"}, r"method.keep is 'much'"),
        ("own_methods.halves:halves", {"preset": "paper"}, r"method.preset 'paper' is unknown"),
        ("own methods:halves", {}, r'expected "package.module:builder"'),
        ("fedsrd:paper", {}, r"there is no module 'fedsrd'.*method.preset"),
    ],
)
def test_what_is_missing_is_named(package, name: str, settings: dict, words: str):
    with pytest.raises(ConfigError, match=words):
        build(name, settings)


def test_a_method_is_taken_wherever_a_name_is():
    method = fedloom.replace(build("fedit"), name="mine")
    assert isinstance(method, Method) and build(method) is method
    with pytest.raises(ConfigError, match="'mine' is built already: give keep to its builder"):
        build(method, {"keep": 1})


def test_a_variant_may_be_of_another_package():
    def overrides(variant):
        return expand_variant(Config(), variant)[variant]

    assert overrides("own.halves:halves") == ["method.name=own.halves:halves"]
    assert overrides("own:halves:keep=0.25,lora.r=2") == ["method.name=own:halves", "method.keep=0.25", "lora.r=2"]
    assert overrides("fedsrd:paper") == ["method.name=fedsrd", "method.preset=paper"]
    assert overrides("fedsdr:ridge=0.1") == ["method.name=fedsdr", "method.ridge=0.1"]


def test_a_site_runs_foreign_code_only_where_its_policy_names_it(package):
    name = "own_methods.halves:halves"
    for policy in (Policy(), Policy(methods=("fedit", "own_methods.halves"))):
        with pytest.raises(PolicyRefusal, match="own_methods.halves:halves") as caught:
            check_method_allowed(policy, name)
        assert "is not allowed" in caught.value.public
        with pytest.raises(PolicyRefusal):
            check_job(policy, name, [], 1, Spending())
    check_method_allowed(Policy(methods=(name,)), name)
    for own in METHODS:
        check_method_allowed(Policy(), own)
    assert "own_methods.halves" not in sys.modules


def test_a_worker_asks_its_policy_before_it_imports_anything(package):
    site = SiteConfig(name="lab", model=str(package), data=str(package / "data"), state=str(package / "state"))
    desk = Desk(site, assembled=lambda config: build(config.method.name))
    config = Config.model_validate(
        {"method": {"name": "own_methods.halves:halves"}, "federation": {"participants": ["lab"]}}
    )
    with pytest.raises(PolicyRefusal, match="it must be in policy.methods"):
        desk.open(Request("hello", "job", dump(config), "", 1, 0))
    assert "own_methods.halves" not in sys.modules
