"""What the doctor looks at on any machine: versions, disk, clock, files, certificates, the way to the SuperLink."""

from __future__ import annotations

import http.client
import platform
import shutil
import socket
import ssl
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib import metadata
from pathlib import Path

from fedloom.deploy.certificates import hosts_of, is_signed_by, read_certificate, read_key, san
from fedloom.deploy.check import Check, fail, ok, warn

AHEAD_SECONDS, BEHIND_SECONDS = 5, 305
"""How far a site's clock may be off before Flower refuses its signatures (flwr 1.41)."""
FLEET = "/v1/fleet/"
"""What a site needs of the SuperLink's paths."""
_REACH = "start superlink.sh behind the proxy, and see the proxy's error log"
_BLOCKED = {403: "let this path pass: server/nginx.conf, server/Caddyfile", 502: _REACH, 503: _REACH, 504: _REACH}
"""HTTP status that no SuperLink gives to `FLEET` → what to do about it."""
_GIB = 2**30


def check_versions(needed: Sequence[str]) -> list[Check]:
    """Python and the packages that fedloom names as its requirements, at the versions that it names."""
    from packaging.requirements import Requirement

    found = [ok("Python", platform.python_version())]
    for text in metadata.requires("fedloom") or ():
        requirement = Requirement(text)
        if requirement.name not in needed or requirement.specifier is None:
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            found.append(fail(requirement.name, "is not installed", 'pip install "fedloom[flower]"'))
            continue
        if requirement.specifier.contains(version, prereleases=True):
            found.append(ok(requirement.name, version))
        else:
            advice = f'pip install "{requirement.name}{requirement.specifier}"'
            found.append(fail(requirement.name, f"{version}, fedloom needs {requirement.specifier}", advice))
    return [ok("fedloom", metadata.version("fedloom")), *found]


def check_disk(folder: Path) -> Check:
    """Free space where state is kept."""
    at = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(at).free / _GIB
    text = f"{free:.1f} GiB free at {at}"
    # A record of one round of a 7B adapter in fp32 takes some hundred MiB: 1 GiB is a few rounds, 5 GiB many.
    if free < 1:
        return fail("disk", text, "make room: states and the record of what left are kept here")
    return ok("disk", text) if free >= 5 else warn("disk", text, "make room before a long run")


def check_clock() -> Check:
    """Whether the system says that it synchronises its clock. Not every system tells."""
    try:
        said = subprocess.run(
            ["timedatectl", "show", "--property=NTPSynchronized", "--value"], capture_output=True, text=True, timeout=5
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        said = ""
    if said == "yes":
        return ok("clock", "kept right by NTP")
    return warn("clock", "not known to be kept right", f"run an NTP client; Flower takes {AHEAD_SECONDS} s at most")


def check_secret(path: Path) -> Check:
    """A file that its owner alone may read."""
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        return fail(path.name, f"mode {mode:04o}: others may read it", f"chmod 600 {path}; make a new one if it was")
    return ok(path.name, f"mode {mode:04o}")


def check_node_key(path: Path) -> Check:
    """The private key of a node: an ECDSA key that only its owner may read."""
    curve = read_key(path).curve.name
    checked = check_secret(path)
    return checked if checked.outcome == "fail" else ok(path.name, f"ECDSA on {curve}, {checked.found}")


def check_authority(path: Path) -> Check:
    """The CA certificate: is it one, and is it in date?"""
    certificate = read_certificate(path)
    if not is_signed_by(certificate, certificate):
        return fail(path.name, "is not a CA's own certificate", "take ca.pem from the federation's operator again")
    return check_dates(path, "ask the federation's operator for the new CA")


def check_dates(path: Path, advice: str) -> Check:
    """Whether a certificate is in date, today and for the next month."""
    certificate, now = read_certificate(path), datetime.now(UTC)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    text = f"valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}"
    if not begins <= now <= ends:
        return fail(path.name, text, advice)
    left = (ends - now).days  # a month is time enough to plan a renewal
    return ok(path.name, text) if left >= 30 else warn(path.name, f"{text}, {left} days left", advice)


def check_certificate(folder: Path, hosts: Sequence[str]) -> list[Check]:
    """The server's certificate: in date, signed by the CA, for these hosts, with its key."""
    path, renew = folder / "server.pem", "fedloom federation renew DIR, then restart SuperLink and proxy"
    own, ca = read_certificate(path), read_certificate(folder / "ca.pem")
    found = [check_dates(path, renew)]
    if not is_signed_by(own, ca):
        found.append(fail("chain", "server.pem is not signed by the CA in ca.pem", renew))
    else:
        found.append(ok("chain", "server.pem is signed by the CA in ca.pem"))
    named = hosts_of(own)
    missing = [host for host in hosts if str(san(host).value) not in named]
    text = f"for {', '.join(named) or 'no host'}"
    found.append(fail("SANs", f"{text}; not for {missing[0]}", renew) if missing else ok("SANs", text))
    if read_key(folder / "server.key").public_key() != own.public_key():
        found.append(fail("server.key", "belongs to another certificate than server.pem", renew))
    return [*found, check_secret(folder / "server.key")]


@dataclass(frozen=True, slots=True)
class Answer:
    """What the other side said: HTTP status by path, its clock against this one's (seconds, positive: we are ahead)."""

    statuses: dict[str, int]
    ahead: float | None
    ends: datetime
    loopback: bool


def ask_superlink(host: str, port: int, ca: Path, paths: Sequence[str], timeout: float = 5.0) -> Answer:
    """GET these paths over TLS, trusting this CA alone. Raises OSError (ssl.SSLError is one) where that fails."""
    context = ssl.create_default_context(cafile=str(ca))
    statuses: dict[str, int] = {}
    ahead = None
    for path in paths:
        connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=context)
        try:
            connection.request("GET", path)
            secured = connection.sock
            peer = secured.getpeername()[0]
            ends = ssl.cert_time_to_seconds(str((secured.getpeercert() or {})["notAfter"]))
            reply = connection.getresponse()
            statuses[path] = reply.status
            if date := reply.getheader("Date"):
                # The header has whole seconds, cut off: the true time is half a second later on average.
                ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds() - 0.5
        except http.client.HTTPException as error:
            raise OSError(f"{host}:{port} does not speak HTTP over TLS: {error!r}") from None
        finally:
            connection.close()
    return Answer(statuses, ahead, datetime.fromtimestamp(ends, UTC), peer.startswith("127.") or peer == "::1")


def check_superlink(host: str, port: int, ca: Path) -> list[Check]:
    """The way from a site to the SuperLink: name, port, TLS, clocks, and that nothing but the fleet path is open."""
    what = f"SuperLink {host}:{port}"
    try:
        answer = ask_superlink(host, port, ca, [FLEET, "/health"])
    except socket.gaierror:
        return [fail(what, "the name cannot be resolved", "check the address and this machine's DNS")]
    except ssl.SSLCertVerificationError as error:
        return [fail(what, f"its certificate is refused: {error.verify_message}", "compare ca.pem, names and clocks")]
    except TimeoutError:
        return [fail(what, "no answer in 5 s", "open this port, outgoing, in the firewall")]
    except ConnectionRefusedError:
        return [fail(what, "nobody listens there", "start superlink.sh, and the proxy where there is one")]
    except OSError as error:
        return [fail(what, f"no TLS connection: {error}", "is this the SuperLink, and does it use TLS?")]
    found = [ok(what, f"TLS, certificate valid to {answer.ends:%Y-%m-%d}"), _clocks(answer.ahead)]
    if (status := answer.statuses[FLEET]) in _BLOCKED:
        return [*found, fail("fleet path", f"the proxy answers {status} to {FLEET}", _BLOCKED[status])]
    if answer.statuses["/health"] != 200:
        return [*found, ok("exposure", "only the fleet path is open from here")]
    text = "all paths of the SuperLink are open from here, those that submit code included"
    if answer.loopback:
        return [*found, ok("exposure", f"{text}; on this machine alone")]
    return [*found, warn("exposure", text, "let the world reach the proxy only (server/nginx.conf, server/Caddyfile)")]


def _clocks(ahead: float | None) -> Check:
    if ahead is None:
        return check_clock()
    text = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if not -BEHIND_SECONDS < ahead < AHEAD_SECONDS:
        return fail("clock", text, "run an NTP client: Flower refuses signatures of another time")
    # Well within AHEAD_SECONDS, so that a clock that drifts is seen before it fails.
    return ok("clock", text) if abs(ahead) < 3 else warn("clock", text, "run an NTP client on both machines")
