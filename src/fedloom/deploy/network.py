"""The way from here to the SuperLink, taken as Flower's own client takes it: through a proxy where one is set."""

from __future__ import annotations

import json
import os
import socket
import ssl
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from urllib.request import getproxies

from fedloom.deploy.check import Check, fail, ok, warn
from fedloom.deploy.machine import AHEAD_SECONDS, BEHIND_SECONDS, check_clock, check_end
from fedloom.deploy.versions import check_superlink_version
from fedloom.flower.proxies import causes, explain_proxy, proxy_to, shown

FLEET = "/v1/fleet/"
"""What a site needs of the SuperLink's paths."""
DESCRIPTION = "/openapi.json"
"""Where a SuperLink says which version it has (flwr 1.41). The proxies of `federation init` let it pass."""
_MOST_DESCRIPTION = 8 * 2**20
"""Bytes of it that are read; flwr 1.41's has some hundred KiB."""
_REACH = "start superlink.sh behind the proxy, and see the proxy's error log"
_BLOCKED = {403: "let this path pass: server/nginx.conf, server/Caddyfile", 502: _REACH, 503: _REACH, 504: _REACH}
"""HTTP status that no SuperLink gives to `FLEET` → what to do about it."""
LOOPBACK = "127.0.0.1,localhost,::1"
"""What never goes through a proxy: Flower's own processes speak with each other over these."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the other side said: HTTP status by path, its clock against this one's (seconds, positive: we are ahead).

    version: of flwr, "" where it is not told. proxy: the way there led through this one, "" for none.
    """

    statuses: dict[str, int]
    ahead: float | None
    ends: datetime
    loopback: bool
    version: str = ""
    proxy: str = ""


def ask_superlink(host: str, port: int, ca: Path, paths: Sequence[str], timeout: float = 5.0) -> Answer:
    """GET these paths over TLS, trusting this CA alone. Raises OSError where that fails, with its cause."""
    import httpx

    statuses: dict[str, int] = {}
    ahead, version, proxy = None, "", proxy_to(host)
    named = f"[{host}]" if ":" in host else host
    try:
        with httpx.Client(verify=ssl.create_default_context(cafile=str(ca)), timeout=timeout) as client:
            for path in paths:
                with client.stream("GET", f"https://{named}:{port}{path}") as reply:
                    secured = reply.extensions["network_stream"]
                    peer = secured.get_extra_info("server_addr")[0]
                    certificate = secured.get_extra_info("ssl_object").getpeercert() or {}
                    statuses[path] = reply.status_code
                    if date := reply.headers.get("Date"):
                        # The header has whole seconds, cut off: the true time is half a second later on average.
                        ahead = (datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds() - 0.5
                    if path == DESCRIPTION and reply.status_code == 200:
                        version = _version_in(reply.iter_bytes())
    except httpx.TimeoutException:
        raise TimeoutError from None
    except httpx.HTTPError as error:
        found, advice = explain_proxy(error, f"{named}:{port}")
        if found:
            raise ProxyRefusal(found, advice) from None
        raise _cause(error) or OSError(f"{host}:{port} does not speak HTTP over TLS: {error!r}") from None
    ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(certificate["notAfter"])), UTC)
    return Answer(statuses, ahead, ends, not proxy and (peer.startswith("127.") or peer == "::1"), version, proxy)


class ProxyRefusal(OSError):
    """A proxy on the way said no, or is not there. advice: what to do."""

    def __init__(self, found: str, advice: str) -> None:
        super().__init__(found)
        self.advice = advice


def check_proxies(script: Path) -> Check:
    """Whether Flower's processes on this machine reach each other: a proxy for all would be asked for loopback too.

    script: what starts Flower here; those of `federation init` take loopback out by themselves.
    """
    used = proxy_to("127.0.0.1", "http") or proxy_to("localhost", "http")
    if used and not (script.is_file() and "NO_PROXY" in script.read_text(encoding="utf-8")):
        line = f"export NO_PROXY={LOOPBACK}" + (",$NO_PROXY" if os.environ.get("NO_PROXY") else "")
        found = f"{shown(used)} is set for loopback too: Flower's SuperExec would ask it for the SuperNode, and end"
        return fail("proxy", found, f"{line} (add this line to {script.name})")
    told = {scheme: proxy for scheme, proxy in getproxies().items() if scheme in ("http", "https", "all")}
    return ok("proxy", ", ".join(f"{scheme}: {shown(proxy)}" for scheme, proxy in sorted(told.items())) or "none set")


def check_superlink(host: str, port: int, ca: Path) -> list[Check]:
    """The way from a site to the SuperLink: name, port, TLS, clocks, and that nothing but the fleet path is open."""
    what = f"SuperLink {host}:{port}"
    try:
        answer = ask_superlink(host, port, ca, [FLEET, "/health", DESCRIPTION])
    except ProxyRefusal as error:
        return [fail(what, str(error), error.advice)]
    except socket.gaierror:
        return [fail(what, "the name cannot be resolved", "check the address and this machine's DNS")]
    except ssl.SSLCertVerificationError as error:
        return [fail(what, f"its certificate is refused: {error.verify_message}", "compare ca.pem, names and clocks")]
    except TimeoutError:
        proxy = proxy_to(host)
        through = f" through the proxy {shown(proxy)}" if proxy else ""
        return [fail(what, f"no answer in 5 s{through}", "open this port, outgoing, in the firewall")]
    except ConnectionRefusedError:
        return [fail(what, "nobody listens there", "start superlink.sh, and the proxy where there is one")]
    except OSError as error:
        return [fail(what, f"no TLS connection: {error}", "is this the SuperLink, and does it use TLS?")]
    way = f" through the proxy {shown(answer.proxy)}" if answer.proxy else ""
    text = f"TLS{way}, certificate valid to {answer.ends:%Y-%m-%d}"
    found = [check_end(what, text, answer.ends, "ask the federation's operator to renew it"), _clocks(answer.ahead)]
    if (status := answer.statuses[FLEET]) in _BLOCKED:
        return [*found, fail("fleet path", f"the proxy answers {status} to {FLEET}", _BLOCKED[status])]
    return [*found, *check_superlink_version(answer.version), _exposure(answer)]


def _exposure(answer: Answer) -> Check:
    """Whether more than the fleet path is open from here."""
    if answer.statuses["/health"] != 200:
        return ok("exposure", "only the fleet path is open from here")
    text = "all paths of the SuperLink are open from here, those that submit code included"
    if answer.loopback:
        return ok("exposure", f"{text}; on this machine alone")
    return warn("exposure", text, "let the world reach the proxy only (server/nginx.conf, server/Caddyfile)")


def _version_in(pieces: Iterator[bytes]) -> str:
    """The version that a SuperLink's description of itself names; "" where it is none."""
    content = b""
    for piece in pieces:
        content += piece
        if len(content) > _MOST_DESCRIPTION:
            return ""
    try:
        told = json.loads(content)
        info = told["info"] if isinstance(told, Mapping) else {}
        return str(info["version"])[:40] if "SuperLink" in str(info["title"]) else ""
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""


def _cause(error: BaseException) -> OSError | None:
    """The system's own error behind one of httpx."""
    return next((one for one in causes(error) if isinstance(one, OSError)), None)


def _clocks(ahead: float | None) -> Check:
    if ahead is None:
        return check_clock()
    text = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the server's"
    if not -BEHIND_SECONDS < ahead < AHEAD_SECONDS:
        return fail("clock", text, "run an NTP client: Flower refuses signatures of another time")
    # Well within AHEAD_SECONDS, so that a clock that drifts is seen before it fails.
    return ok("clock", text) if abs(ahead) < 3 else warn("clock", text, "run an NTP client on both machines")
