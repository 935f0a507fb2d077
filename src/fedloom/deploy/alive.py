"""`python -m fedloom.deploy.alive [FOLDER]`: does what runs from this folder answer? For containers' health checks.

A site's folder has a SITE.toml: its worker must take a connection on its socket. A server's has a federation.toml: its
SuperLink must say over TLS that it is well. Exit code 0 or 1, and one line that says why. Python's own library alone is
imported, since it runs twice a minute.
"""

from __future__ import annotations

import http.client
import socket
import ssl
import sys
import tomllib
from pathlib import Path

SECONDS = 5.0
"""For an answer; a worker that trains takes connections meanwhile."""


def answers(folder: Path) -> str:
    """What answered. Raises OSError, KeyError or ValueError where nothing did, or the folder is none of these."""
    if (folder / "SITE.toml").exists():
        return _worker(folder / tomllib.loads((folder / "SITE.toml").read_text(encoding="utf-8"))["socket"])
    return _superlink(folder, tomllib.loads((folder / "federation.toml").read_text(encoding="utf-8"))["listen"])


def _worker(path: Path) -> str:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(SECONDS)
        connection.connect(str(path))
    return f"the worker at {path}"


def _superlink(folder: Path, listen: str) -> str:
    context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    host, _, port = listen.rpartition(":")
    connection = http.client.HTTPSConnection(host.strip("[]"), int(port), timeout=SECONDS, context=context)
    try:
        connection.request("GET", "/health")
        if (status := connection.getresponse().status) != 200:
            raise OSError(f"the SuperLink at {listen} says {status}")
    finally:
        connection.close()
    return f"the SuperLink at {listen}"


def main(arguments: list[str]) -> int:
    """The exit code."""
    folder = Path(*arguments[:1])
    try:
        print(f"{answers(folder)} answers")
    except (OSError, KeyError, ValueError, http.client.HTTPException) as error:
        print(f"nothing answers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
