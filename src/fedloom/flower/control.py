"""What a run across machines is known by: its number at the SuperLink, and the ends of the certificates there."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from fedloom.errors import CheckpointError
from fedloom.records.config import FlowerSettings

NUMBER = "flower-run"
"""The file in a run's folder that holds its number."""
CONNECT_SECONDS = 5.0
"""The SuperLink is on the same machine: a run need not wait longer for its certificate."""


def keep_number(folder: Path, number: int | None) -> None:
    """Write the number of the run that works in the folder from now on."""
    if number is not None:
        (folder / NUMBER).write_text(f"{number}\n", encoding="utf-8")


def read_number(folder: Path) -> int:
    """The number of the run that worked in the folder last. Raises CheckpointError where none did over a SuperLink."""
    with suppress(OSError, ValueError):
        return int((folder / NUMBER).read_text(encoding="utf-8"))
    raise CheckpointError(
        f"{folder} holds no run of a SuperLink ({NUMBER} is missing there): a run of another engine is ended with "
        "Ctrl-C where it was started"
    )


def certificate_ends(rules: FlowerSettings) -> dict[str, str]:
    """Whose certificate ("server", "ca") → when it ends, ISO 8601, UTC; without those that cannot be told."""
    if rules.insecure or rules.root_certificates is None:
        return {}
    ends: dict[str, str] = {}
    with suppress(OSError, ValueError):
        context = ssl.create_default_context(cafile=rules.root_certificates)
        ends |= _end("ca", *context.get_ca_certs())
        host, _, port = rules.superlink.rpartition(":")
        with (
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS) as line,
            context.wrap_socket(line, server_hostname=host.strip("[]")) as secured,
        ):
            ends |= _end("server", secured.getpeercert() or {})
    return ends


def _end(whose: str, *certificates: Mapping[str, object]) -> dict[str, str]:
    """The earliest end of some certificates, as `ssl` tells of them."""
    times = [ssl.cert_time_to_seconds(str(held["notAfter"])) for held in certificates if "notAfter" in held]
    return {whose: datetime.fromtimestamp(min(times), UTC).isoformat()} if times else {}
