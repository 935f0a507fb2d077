"""`fedloom federation init --containers`: what runs server and sites in containers, beside the files that init writes.

DIR/
  containers/              the image: Containerfile, the versions that it pins, what a build may read; no key in it
    charts/server, /site   Helm charts; nothing in them is of this federation
  server/                  compose.yaml, compose.podman.yaml, nginx.container.conf, values.yaml
  sites/NAME/              compose.yaml, compose.podman.yaml, values.yaml

The containers run the scripts and read the settings that are there without them: every file is mounted where those look
for it, under /fedloom. Keys are mounted as well and never part of an image.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata, resources
from pathlib import Path, PurePosixPath
from string import Template

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from fedloom.deploy.federation import FederationPlan, parse_endpoint, read_plan, write_new
from fedloom.errors import ConfigError

FOLDER = "containers"
HOME = PurePosixPath("/fedloom")
"""Where everything lies in a container."""
EXTRAS = ("fast", "flower")
"""Of fedloom, in the image."""
PROXY_PORTS = (8443, 9443)
"""Where the proxy listens in its container: no privileged port, and not the SuperLink's own."""
_CHARTS = {
    "server": ("Chart.yaml", "templates/_helpers.tpl", "templates/server.yaml"),
    "site": ("Chart.yaml", "templates/_helpers.tpl", "templates/site.yaml"),
}


class _Text(Template):
    """%{name} stands for a value, so that $ and {{ }} keep their meaning."""

    delimiter = "%"


def check_containers(federation: FederationPlan) -> None:
    """Raises ConfigError where server or sites could not run in containers as they are set up."""
    host, _ = parse_endpoint(federation.listen, "--listen")
    if host not in ("127.0.0.1", "localhost", "::1"):
        raise ConfigError(
            f"--listen {federation.listen!r}: in a container the SuperLink listens on loopback, and the proxy beside "
            "it lets the sites in; expected 127.0.0.1:PORT"
        )
    for option, text in (("--model", federation.model), ("--data", federation.data)):
        if re.search(r"[:$\n]", text):
            raise ConfigError(f"{option} {text!r}: a path with ':' or '$' cannot be mounted; choose another one")


def write_containers(folder: Path) -> Path:
    """Write the files of image, server and all sites; returns the image's folder. `folder`: a federation's."""
    federation, made = read_plan(folder), folder / FOLDER
    check_containers(federation)
    write_new(made / "Containerfile", _filled("Containerfile", _values(federation)))
    write_new(made / ".containerignore", _filled("containerignore", {}))
    write_new(made / ".dockerignore", _filled("containerignore", {}))  # docker reads this name alone
    write_new(made / "constraints.txt", "".join(f"{line}\n" for line in pinned()))
    write_new(made / ".gitignore", "*\n")
    for chart, names in _CHARTS.items():
        for name in names:
            write_new(made / "charts" / chart / name, _template(f"charts/{chart}/{name}"))
    _write_server(folder / "server", federation)
    for site in sorted((folder / "sites").iterdir()):
        write_site_containers(folder, site.name)
    return made


def write_site_containers(folder: Path, site: str) -> None:
    """Write one site's files, for a federation that has an image."""
    federation, place = read_plan(folder), folder / "sites" / site
    data = federation.data.replace("{site}", site)
    values = {
        **_values(federation),
        "project": _project(federation, site),
        "model_mount": _mount(federation.model),
        "data_mount": _mount(data),
        "model_folder": _inside(federation.model),
        "data_folder": _inside(data if not PurePosixPath(data).suffix else str(PurePosixPath(data).parent)),
    }
    write_new(place / "compose.yaml", _filled("site/compose.yaml", values))
    write_new(place / "compose.podman.yaml", _filled("podman.yaml", {"first": "worker", "second": "node"}))
    write_new(place / "values.yaml", _filled("site/values.yaml", values))


def _write_server(place: Path, federation: FederationPlan) -> None:
    host, _ = parse_endpoint(federation.address, "--address")
    values = {
        **_values(federation),
        "project": _project(federation, "server"),
        "model": _inside(federation.model),
        "model_mount": _mount(federation.model),
    }
    write_new(place / "compose.yaml", _filled("server/compose.yaml", values))
    write_new(place / "compose.podman.yaml", _filled("podman.yaml", {"first": "superlink", "second": "proxy"}))
    write_new(place / "values.yaml", _filled("server/values.yaml", values))
    inside = {
        "host": host,
        "port": values["proxy_port"],
        "listen": federation.listen,
        "folder": HOME,
        "unit": "fedloom",
    }
    write_new(place / "nginx.container.conf", _filled("../nginx.conf", inside))
    (place / "revoked").mkdir(exist_ok=True)  # a folder that is mounted has to be there


def _values(federation: FederationPlan) -> dict[str, object]:
    _, port = parse_endpoint(federation.address, "--address")
    _, own = parse_endpoint(federation.listen, "--listen")
    return {
        "version": metadata.version("fedloom"),
        "python": ".".join(platform.python_version_tuple()[:2]),
        "port": port,
        "proxy_port": next(number for number in PROXY_PORTS if number != own),
    }


def _project(federation: FederationPlan, part: str) -> str:
    """A name that compose and Kubernetes take: small letters, digits and dashes."""
    words = "-".join(filter(None, ("fedloom", federation.name, part.lower())))
    return re.sub(r"[^a-z0-9-]", "-", words).strip("-")


def _mount(path: str) -> str:
    """A volume in compose's short form: where it lies outside, and where the settings look for it inside."""
    place = PurePosixPath(path)
    return json.dumps(f"{place if place.is_absolute() else f'./{place}'}:{HOME / place}:ro")


def _inside(path: str) -> str:
    """Where the settings look for it inside; in the quotes of JSON, which are those of YAML as well."""
    return json.dumps(str(HOME / path))


def pinned(extras: Sequence[str] = EXTRAS) -> list[str]:
    """All that fedloom with these extras needs, at the versions that are installed here: NAME==VERSION, in order.

    Builds of one version are not told apart (2.13.0+cpu is 2.13.0): which one suits is up to whoever builds the image.
    """
    found: dict[str, str] = {}
    asked: set[tuple[str, str]] = set()
    waiting = [Requirement(f"fedloom[{','.join(extras)}]")]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if (name, extra) not in asked:
                asked.add((name, extra))
                waiting += _needed(name, extra)
        try:
            found[name] = Version(metadata.version(name)).public
        except metadata.PackageNotFoundError:
            continue  # an extra that is not installed here: pip chooses its version
    found.pop("fedloom", None)
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def _needed(name: str, extra: str) -> Iterator[Requirement]:
    """What a package asks for, itself or for one of its extras, on a machine like this one."""
    try:
        texts = metadata.requires(name) or ()
    except metadata.PackageNotFoundError:
        return
    for requirement in map(Requirement, texts):
        marker = requirement.marker
        plain = marker is None or marker.evaluate({"extra": ""})
        if plain if not extra else (not plain and marker is not None and marker.evaluate({"extra": extra})):
            yield requirement


def _filled(name: str, values: Mapping[str, object]) -> str:
    """A template with its values. Paths come with their quotes (`_mount`, `_inside`); all else needs none."""
    return _Text(_template(name)).substitute(values)


def _template(name: str) -> str:
    return (resources.files("fedloom.deploy") / "templates" / "containers" / name).read_text(encoding="utf-8")
