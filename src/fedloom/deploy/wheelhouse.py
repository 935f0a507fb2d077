"""All wheels that a site needs, in one folder, so that it installs fedloom without an index of packages.

pip fetches them, at the versions that are installed here. What is asked for is decided here and not by pip, which reads
the conditions of requirements ("only on Linux") as if they were about this machine, even where it fetches for another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from importlib import metadata, resources
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from fedloom.deploy.containers import EXTRAS, pinned
from fedloom.deploy.platforms import Target
from fedloom.errors import ConfigError

PIP = (sys.executable, "-m", "pip")
_BLOCK = 4096
"""Bytes of which a file takes a whole number on most disks."""
_REASONS = (
    (r"No space left|Errno 28", "the disk is full: make room, then run the same command again"),
    (
        r"NewConnectionError|ConnectTimeout|Max retries|ProxyError|SSLError|Temporary failure in name",
        "no package index can be reached: run it where there is a network, or name a folder of wheels (--find-links)",
    ),
    (
        r"No matching distribution|Could not find a version|ResolutionImpossible",
        "no index here has such a wheel: name one that has it (--extra-index-url), or another --python or --platform",
    ),
    (r"No module named pip", "this Python has no pip: python -m ensurepip"),
)
"""What pip's words mean, the first that is found."""
_NOT_IN_WHEELS = {"RECORD", "INSTALLER", "REQUESTED", "direct_url.json"}
"""What an installation adds to the folder of a wheel's metadata."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a wheelhouse is for. extras: of fedloom. pip: further options, such as an index."""

    targets: tuple[Target, ...]
    extras: tuple[str, ...] = EXTRAS
    pip: tuple[str, ...] = ()


def fill_wheelhouse(store: Path, asked: Asked) -> Path:
    """The folder in `store` that holds what was asked for. What is there already is not fetched again.

    Raises ConfigError where pip fails, or wheels are missing.
    """
    store.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=store) as scratch:
        own = pack_fedloom(Path(scratch), asked.pip)
        pins = dict(line.split("==") for line in pinned(asked.extras))
        facts = [own.name, _digest(own), pins, repr(asked)]
        filled = store / hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
        if filled.is_dir():
            return filled
        partial = filled.with_suffix(".partial")  # kept where pip fails: what it holds is not fetched again
        for target in asked.targets:
            _fetch(partial, own, pins, target, asked)
    partial.rename(filled)
    return filled


def unpacked_bytes(wheels: Sequence[Path]) -> int:
    """What they take once they are installed: their files, and Python's compiled ones, about as large as the source."""
    members = [member for wheel in wheels for member in zipfile.ZipFile(wheel).infolist()]
    taken = [(-(-member.file_size // _BLOCK) * _BLOCK, member.filename.endswith(".py")) for member in members]
    return sum(size * (2 if compiled else 1) for size, compiled in taken)


def list_missing(wheels: Sequence[Path], wanted: Requirement, target: Target) -> list[Requirement]:
    """What the wheels ask for on that machine, as `wanted` does, and none of them is."""
    tags, held = target.tags(), [(wheel, *parse_wheel_filename(wheel.name)) for wheel in wheels]
    missing, asked, waiting = [], set(), [wanted]
    while waiting:
        requirement = waiting.pop()
        named = canonicalize_name(requirement.name)
        fits = [
            wheel
            for wheel, name, version, _, own in held
            if name == named and tags & own and requirement.specifier.contains(version, prereleases=True)
        ]
        if not fits:
            missing.append(requirement)
            continue
        for extra in ("", *requirement.extras):
            if (named, extra) not in asked:
                asked.add((named, extra))
                waiting += _requirements(fits[0], extra, target)
    return missing


def _requirements(wheel: Path, extra: str, target: Target) -> Iterator[Requirement]:
    """What a wheel asks for on that machine, by itself or for one of its extras."""
    environment = target.environment()
    for text in _metadata(wheel):
        requirement = Requirement(text)
        marker = requirement.marker
        plain = marker is None or marker.evaluate({**environment, "extra": ""})
        if (
            plain
            if not extra
            else (not plain and marker is not None and marker.evaluate({**environment, "extra": extra}))
        ):
            yield requirement


def _metadata(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as opened:
        name = next(name for name in opened.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name))
        return HeaderParser().parsestr(opened.read(name).decode("utf-8")).get_all("Requires-Dist") or []


def _fetch(into: Path, own: Path, pins: Mapping[str, str], target: Target, asked: Asked) -> None:
    """Have pip fetch what is missing on one kind of machine, then what that asks for, until nothing is missing."""
    wanted = Requirement(f"fedloom[{','.join(asked.extras)}]")
    command = [
        "download",
        "--quiet",
        "--no-input",
        "--no-deps",
        "--only-binary=:all:",
        *target.pip_options(),
        *asked.pip,
    ]
    into.mkdir(exist_ok=True)
    shutil.copyfile(own, into / own.name)
    held = sorted(into.glob("*.whl"))
    while missing := list_missing(held, wanted, target):
        names = sorted({_pinned(requirement, pins) for requirement in missing})
        run_pip([*command, "--dest", str(into), *names], f"for {target.words}")
        before, held = held, sorted(into.glob("*.whl"))
        if held == before:
            raise ConfigError(f"wheels for {target.words}: pip did not fetch {names[0]}; name an index that has it")


def _pinned(requirement: Requirement, pins: Mapping[str, str]) -> str:
    """What pip is asked for: the version that is installed here, where the requirement takes that."""
    pin = pins.get(canonicalize_name(requirement.name), "")
    taken = f"=={pin}" if pin and requirement.specifier.contains(pin, prereleases=True) else requirement.specifier
    return f"{requirement.name}{taken}"


def pack_fedloom(into: Path, pip: Sequence[str] = ()) -> Path:
    """A wheel of the fedloom that runs here: built by pip from its source tree, or else put together from what is
    installed. pip: further options of its. Raises ConfigError.
    """
    package = Path(str(resources.files("fedloom")))
    if package.parent.name == "src" and (package.parents[1] / "pyproject.toml").is_file():
        command = [
            "wheel",
            "--quiet",
            "--no-input",
            "--no-deps",
            *pip,
            "--wheel-dir",
            str(into),
            str(package.parents[1]),
        ]
        run_pip(command, "for fedloom's own wheel")
        return next(into.glob("fedloom-*.whl"))
    return _pack_installed(package, metadata.distribution("fedloom"), into)


def _pack_installed(package: Path, installed: metadata.Distribution, into: Path) -> Path:
    """The wheel that fedloom was installed from, as far as it is told from any other: same files, same metadata."""
    folder = f"fedloom-{installed.version}.dist-info"
    files = {
        path.relative_to(package.parent).as_posix(): path.read_bytes()
        for path in sorted(package.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    for entry in sorted(installed.files or (), key=str):
        inside = entry.as_posix().partition(f"{folder}/")[2]
        if inside and inside not in _NOT_IN_WHEELS:
            files[f"{folder}/{inside}"] = entry.read_binary()
    if f"{folder}/METADATA" not in files or f"{folder}/WHEEL" not in files:
        raise ConfigError(
            f"fedloom {installed.version} was installed in a way that tells no files of it: pip install it"
        )
    made = into / f"fedloom-{installed.version}-py3-none-any.whl"
    record = [f"{name},sha256={_record_digest(content)},{len(content)}" for name, content in files.items()]
    files[f"{folder}/RECORD"] = "\n".join([*record, f"{folder}/RECORD,,", ""]).encode()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in files.items():
            # A fixed date, so that the same files make the same wheel.
            told = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            told.compress_type, told.external_attr = zipfile.ZIP_DEFLATED, 0o100644 << 16
            wheel.writestr(told, content)
    return made


def run_pip(arguments: Sequence[str], purpose: str) -> None:
    """Run pip. Raises ConfigError with what it complained of, and what that means."""
    done = subprocess.run([*PIP, *arguments], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return
    errors = re.findall(r"(?m)^\s*ERROR: (?!ResolutionImpossible)(.+)$", done.stderr)
    lines = ["nothing", *(errors or done.stderr.split("\n"))]
    said = next(line.strip() for line in reversed(lines) if line.strip())
    meant = next((text for pattern, text in _REASONS if re.search(pattern, done.stderr)), "see what pip says")
    raise ConfigError(f"pip could not fetch wheels {purpose}: {meant}. pip said: {said}")


def _digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _record_digest(content: bytes) -> str:
    """A digest as RECORD has it (PEP 376)."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
