"""HTTP proxies on the way out: which one is, what went wrong at it, and what it must not be asked for: what runs on the
machine itself, Flower's own processes too.
"""

from __future__ import annotations

import os
import ssl
from collections.abc import Iterator
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def exempt_loopback() -> None:
    """Add loopback to NO_PROXY of this process and of those that it starts; the rest of it stays."""
    told = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""  # the order in which httpx looks
    names = [name.strip() for name in told.split(",") if name.strip()]
    value = ",".join([*names, *(name for name in LOOPBACK if name not in names)])
    os.environ.update(no_proxy=value, NO_PROXY=value)


def proxy_to(host: str, scheme: str = "https") -> str:
    """The proxy that the environment puts on the way to this host, "" for none."""
    proxies = getproxies()
    if proxy_bypass(host):
        return ""
    return proxies.get(scheme) or proxies.get("all") or ""


def shown(proxy: str) -> str:
    """A proxy's address without the password that may stand in it."""
    told = proxy if "://" in proxy else f"http://{proxy}"
    return f"{told.partition('://')[0]}://{urlsplit(told).netloc.rpartition('@')[2]}"


def explain_proxy(error: Exception, superlink: str) -> tuple[str, str]:
    """(what is wrong at the proxy on the way to host:port, what to do about it); twice "" where no proxy is to blame.

    error: one of httpx.
    """
    import httpx

    host = superlink.rpartition(":")[0].strip("[]")
    proxy = proxy_to(host)
    if not proxy:
        return "", ""
    around = f"or put {host} into NO_PROXY"
    if isinstance(error, httpx.ProxyError):
        if str(error).startswith("407"):
            return f"the proxy {shown(proxy)} wants a user and a password: {error}", (
                "HTTPS_PROXY=http://USER:PASSWORD@… with those of the proxy"
            )
        found = f"the proxy {shown(proxy)} lets nothing through: {error}"
        return found, f"have the proxy pass CONNECT {superlink} on, {around}"
    cause = next((one for one in causes(error) if isinstance(one, OSError)), None)
    # No connection was had, and the first one goes to the proxy. A line that broke later may have been beyond it.
    later = isinstance(cause, ssl.SSLError | ConnectionResetError | BrokenPipeError)
    if isinstance(error, httpx.ConnectError) and cause is not None and not later:
        return f"the proxy {shown(proxy)} cannot be reached: {cause}", f"check HTTPS_PROXY, {around}"
    return "", ""


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and those behind it."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
