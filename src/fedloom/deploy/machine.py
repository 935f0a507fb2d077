"""What the doctor looks at on any machine: disk, clock, files, keys and certificates."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime, time
from pathlib import Path

from fedloom.deploy.certificates import (
    hosts_of,
    is_signed_by,
    public_line,
    read_certificate,
    read_certificates,
    read_key,
    read_public_key,
    san,
    use_until,
)
from fedloom.deploy.check import Check, fail, ok, warn

AHEAD_SECONDS, BEHIND_SECONDS = 5, 305
"""How far a site's clock may be off before Flower refuses its signatures (flwr 1.41)."""
PLAN_DAYS, URGENT_DAYS = 30, 7
"""Days before an end from which it is told: a month is time enough to plan a renewal, a week hardly is."""
_GIB = 2**30


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
    """The private key of a node: ECDSA, for its owner alone, the one that node.pub says, and not too old."""
    key = read_key(path)
    checked = check_secret(path)
    if checked.outcome == "fail":
        return checked
    found, public = f"ECDSA on {key.curve.name}, {checked.found}", path.with_name("node.pub")
    if not public.exists():
        return ok(path.name, found)
    line = read_public_key(public)
    if line.split()[:2] != public_line(key.public_key()).split():
        return fail(path.name, "is another key than node.pub says", "have the operator register this site's node.pub")
    if (until := use_until(line)) is None:
        return ok(path.name, found)
    advice = "ask the federation's operator to rotate it (fedloom federation rotate DIR NAME)"
    # Flower takes a key of any age, so a key past its time is a warning and stops nothing.
    aged = check_end(path.name, f"{found}, to be used until {until}", datetime.combine(until, time(), UTC), advice)
    return aged if aged.outcome == "ok" else warn(path.name, aged.found, advice)


def check_authority(path: Path) -> Check:
    """The CA certificate, or both while a new CA takes the old one's place: is it one, and is it in date?"""
    held = read_certificates(path)
    if not all(is_signed_by(certificate, certificate) for certificate in held):
        return fail(path.name, "is not a CA's own certificate", "take ca.pem from the federation's operator again")
    checked = check_dates(path, "ask the federation's operator for the new CA")
    if len(held) == 1 or checked.outcome != "ok":
        return checked
    return ok(path.name, f"{checked.found}; the CA before it is trusted too, until the change is over")


def check_dates(path: Path, advice: str) -> Check:
    """Whether a certificate is in date, today and for the next month."""
    certificate = read_certificate(path)
    begins, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    text = f"valid from {begins:%Y-%m-%d} to {ends:%Y-%m-%d}"
    if begins > datetime.now(UTC):
        return fail(path.name, text, advice)
    return check_end(path.name, text, ends, advice)


def check_end(what: str, text: str, ends: datetime, advice: str) -> Check:
    """Whether something ends soon: a warning from a month before, an urgent one in the last week."""
    left = ends - datetime.now(UTC)
    if left.total_seconds() <= 0:
        return fail(what, f"{text}: over", advice)
    if left.days >= PLAN_DAYS:
        return ok(what, text)
    urgent = "" if left.days >= URGENT_DAYS else ": nothing will connect after that"
    return warn(what, f"{text}, {left.days} days left{urgent}", advice if not urgent else f"now: {advice}")


def check_certificate(folder: Path, hosts: Sequence[str]) -> list[Check]:
    """The server's certificate: in date, signed by the CA, for these hosts, with its key."""
    path, renew = folder / "server.pem", "fedloom federation renew DIR, then restart SuperLink and proxy"
    own, authorities = read_certificate(path), read_certificates(folder / "ca.pem")
    found = [check_dates(path, renew)]
    if not any(is_signed_by(own, ca) for ca in authorities):
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
