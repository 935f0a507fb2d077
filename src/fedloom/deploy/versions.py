"""Which versions are here, and whether they fit to each other and to the server's. Nothing is imported for it."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from fedloom.deploy.check import Check, fail, ok, warn

FLWR = "1.41"
"""The minor version of flwr that fedloom is tested with; Flower promises nothing between different ones."""


def check_versions(needed: Sequence[str]) -> list[Check]:
    """Python, fedloom, and the packages that it names as its requirements; each once, whatever extras name it."""
    found = [ok("fedloom", metadata.version("fedloom")), ok("Python", platform.python_version())]
    wanted: dict[str, SpecifierSet] = {}
    for requirement in map(Requirement, metadata.requires("fedloom") or ()):
        if requirement.name in needed:
            wanted[requirement.name] = wanted.get(requirement.name, SpecifierSet()) & requirement.specifier
    return found + [_check_package(name, wanted[name]) for name in needed if name in wanted]


def _check_package(name: str, specifier: SpecifierSet) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return fail(name, "is not installed", 'pip install "fedloom[flower]"')
    if find_spec(name) is None:
        return fail(name, f"{version} is listed, but its files are not there", f"pip install --force-reinstall {name}")
    if not specifier.contains(version, prereleases=True):
        return fail(name, f"{version}, fedloom needs {specifier}", f'pip install "{name}{specifier}"')
    if name == "flwr" and minor(version) != FLWR:
        found = f"{version}, fedloom is tested with {FLWR}, and Flower lets only equal minor versions work together"
        return fail(name, found, f'pip install "flwr~={FLWR}.0"')
    return ok(name, version)


def check_superlink_version(there: str) -> list[Check]:
    """Compare the SuperLink's flwr with the one that is installed here; nothing where it is not told ("")."""
    try:
        here = metadata.version("flwr")
    except metadata.PackageNotFoundError:
        return []  # `check_versions` has said so
    if not there:
        return [ok("flwr there", "the SuperLink's version is not told on this way")]
    if minor(here) != minor(there):
        advice = f'pip install "flwr~={minor(there)}.0" here, or this version there: both must have the same minor'
        return [fail("flwr there", f"the SuperLink has {there}, this machine {here}", advice)]
    return [ok("flwr there", f"the SuperLink has {there}")]


def check_noted(flwr: str, fedloom: str) -> list[Check]:
    """Compare what is installed here with what the federation was set up with (federation.toml; "": not noted)."""
    found = []
    for name, noted in (("flwr", flwr), ("fedloom", fedloom)):
        here = installed(name)
        if noted and here and minor(noted) != minor(here):
            text = f"{here} here, {noted} where the federation was set up"
            found.append(warn(f"{name} noted", text, f"ask the operator which {name} the federation runs now"))
    return found


def installed(name: str) -> str:
    """The version of a package, "" where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def minor(version: str) -> str:
    """The "1.41" of "1.41.2"; the text itself where it is no version."""
    try:
        parsed = Version(version)
    except InvalidVersion:
        return version
    return f"{parsed.major}.{parsed.minor}"
