"""The machines that wheels are fetched for: operating system, processor, C library and Python."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from packaging.tags import Tag, compatible_tags, cpython_tags, mac_platforms

from fedloom.errors import ConfigError

NAMES = {
    "linux-x86_64": "manylinux_2_28_x86_64",
    "linux-aarch64": "manylinux_2_28_aarch64",
    "macos-arm64": "macosx_14_0_arm64",
}
"""Name → tag of the oldest system that the wheels of torch 2.13 run on: glibc 2.28 is that of Debian 10 and RHEL 8."""
_OLD_NAMES = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
"""Minor version of glibc → what wheels for it were called before PEP 600."""
_LEAST_PYTHON = 11


@dataclass(frozen=True, slots=True)
class Target:
    """A kind of machine. system: "Linux" or "Darwin", machine: "x86_64", ...: as Python's `platform` says them.

    least: (major, minor) of the oldest glibc, or of the oldest macOS. python: minor version of Python 3.
    """

    system: str
    machine: str
    least: tuple[int, int]
    python: int

    @property
    def words(self) -> str:
        """The machine as a person says it."""
        library = "glibc" if self.system == "Linux" else "macOS"
        return (
            f"{self.system} {self.machine}, {library} {self.least[0]}.{self.least[1]} or newer, Python 3.{self.python}"
        )

    def platform_tags(self) -> list[str]:
        """The platforms of wheels that run there, the newest first."""
        if self.system == "Darwin":
            return list(mac_platforms(self.least, self.machine))
        return list(_linux_tags(self.least[1], self.machine))

    def tags(self) -> frozenset[Tag]:
        """All tags of wheels that can be installed there."""
        version, platforms = (3, self.python), self.platform_tags()
        own = cpython_tags(version, abis=[f"cp3{self.python}"], platforms=platforms)
        return frozenset([*own, *compatible_tags(version, f"cp3{self.python}", platforms)])

    def pip_options(self) -> list[str]:
        """The options by which pip takes this machine for the one that it fetches wheels for."""
        told = [f"--platform={tag}" for tag in self.platform_tags()]
        return [*told, f"--python-version=3.{self.python}", "--implementation=cp", f"--abi=cp3{self.python}"]

    def environment(self) -> dict[str, str]:
        """What the conditions of requirements (PEP 508) see there. Releases of the system are not known: ""."""
        return {
            "implementation_name": "cpython",
            "implementation_version": f"3.{self.python}.0",
            "os_name": "posix",
            "platform_machine": self.machine,
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": self.system,
            "platform_version": "",
            "python_full_version": f"3.{self.python}.0",
            "python_version": f"3.{self.python}",
            "sys_platform": self.system.lower(),
        }


def parse_targets(platforms: Sequence[str], pythons: Sequence[str]) -> list[Target]:
    """Every platform with every version of Python; none given: those of this machine. Raises ConfigError."""
    minors = [_python(text) for text in pythons or [".".join(platform.python_version_tuple()[:2])]]
    named = [_platform(text) for text in platforms or [f"{_system_here()}-{platform.machine()}"]]
    return list(dict.fromkeys(Target(*place, minor) for place in named for minor in minors))


def _python(text: str) -> int:
    match = re.fullmatch(r"3\.([0-9]{1,2})", text)
    if not match or int(match[1]) < _LEAST_PYTHON:
        raise ConfigError(
            f"--python {text!r}: expected a version such as 3.11; fedloom needs 3.{_LEAST_PYTHON} or newer"
        )
    return int(match[1])


def _platform(text: str) -> tuple[str, str, tuple[int, int]]:
    match = re.fullmatch(r"(manylinux|macosx)_([0-9]{1,2})_([0-9]{1,2})_(x86_64|aarch64|arm64)", NAMES.get(text, text))
    if not match:
        known = ", ".join(NAMES)
        raise ConfigError(
            f"--platform {text!r}: expected one of {known}, or a tag of wheels such as manylinux_2_34_x86_64"
        )
    return ("Linux" if match[1] == "manylinux" else "Darwin", match[4], (int(match[2]), int(match[3])))


def _system_here() -> str:
    return {"Darwin": "macos"}.get(platform.system(), platform.system().lower())


def _linux_tags(newest: int, machine: str) -> Iterator[str]:
    for minor in range(newest, 4, -1):  # before glibc 2.5 there were no such wheels
        yield f"manylinux_2_{minor}_{machine}"
        if minor in _OLD_NAMES:
            yield f"{_OLD_NAMES[minor]}_{machine}"
    yield f"linux_{machine}"  # some indexes have wheels that say nothing of the C library


def joined(targets: Iterable[Target]) -> str:
    """All of them in words."""
    return "; ".join(target.words for target in targets)
