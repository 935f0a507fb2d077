"""What every request and every answer is held to: who asks, how, and what a browser may do with the answer.

The page is for the person at this machine. Another site that is open in the same browser must not read it, not even by
a name of its own that it points at this machine (DNS rebinding): so the Host header has to name this machine.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

METHODS = ("GET", "HEAD")
LOOPBACK = ("localhost", "127.0.0.1", "::1")
HEADERS = {
    # A page may load from here alone; what it may run is said by the answer itself (`app.page_policy`).
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-cache",  # kept, but asked for again: an ETag tells whether it is still the same
}


class Guard:
    """An application behind these rules. hosts: the names under which it may be asked for."""

    def __init__(self, app: ASGIApp, hosts: Iterable[str]) -> None:
        self._app, self._hosts = app, frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        await self._choose(scope)(scope, receive, send_guarded)

    def _choose(self, scope: Scope) -> ASGIApp:
        """The application, or the answer that refuses."""
        if scope["type"] != "http":  # pragma: no cover - the server speaks nothing else (`serving`)
            return PlainTextResponse("only HTTP is served\n", 400)
        host = Headers(scope=scope).get("host", "")
        if not self._allows(host):
            return PlainTextResponse(
                "this page is served under the address that `fedloom serve` printed, and under no other name\n", 421
            )
        if scope["method"] not in METHODS:
            return PlainTextResponse("runs are shown, not changed: GET and HEAD alone\n", 405, {"allow": "GET, HEAD"})
        return self._app

    def _allows(self, host: str) -> bool:
        name = host_name(host)
        return name in self._hosts or ("*" in self._hosts and is_address(name))


def host_name(host: str) -> str:
    """The name in a Host header, without its port and in lower case; an IPv6 address without its brackets."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def is_address(name: str) -> bool:
    """Whether it is an IP address: nobody can point such a name elsewhere."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def allowed_hosts(host: str) -> tuple[str, ...]:
    """The names for a server that is bound to `host`; "*": any address, where others than this machine may ask."""
    return LOOPBACK if is_loopback(host) else (*LOOPBACK, host, socket.gethostname(), "*")


def is_loopback(host: str) -> bool:
    """Whether this name or address is of this machine alone."""
    return host == "localhost" or (is_address(host) and ipaddress.ip_address(host).is_loopback)
