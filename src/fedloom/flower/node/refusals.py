"""What stands between a node and its SuperLink, in one sentence with what to do, where waiting does not help."""

from __future__ import annotations

import ssl
import time
from email.utils import parsedate_to_datetime
from http import HTTPStatus

import httpx
from flwr.supercore.error import ApiErrorCode, FlowerError

from fedloom.errors import SiteError
from fedloom.flower.proxies import causes
from fedloom.records.text import to_printable

AHEAD_SECONDS, BEHIND_SECONDS = 5.0, 300.0
"""How far a site's clock may be from the SuperLink's; flwr 1.41 refuses a signature beyond it."""
_EXPIRED, _NOT_YET = 10, 9
_NAME = (62, 63, 64)
"""OpenSSL's codes of what is wrong with a certificate (X509_V_ERR_…)."""


class NotLetInError(SiteError):
    """The SuperLink refuses this site, and trying again changes nothing: somebody has to do something first."""


class RunOver(Exception):
    """The run that a message belongs to is not running any more."""


def explain_refusal(error: httpx.HTTPError, superlink: str) -> SiteError | None:
    """Why there is no way to the SuperLink until somebody does something; None where trying again may help.

    Raises RunOver where the run is over.
    """
    if isinstance(error, httpx.HTTPStatusError):
        return _explain_status(error.response, superlink)
    for cause in causes(error):
        if isinstance(cause, ssl.SSLCertVerificationError):
            return SiteError(_explain_certificate(cause, superlink))
        if isinstance(cause, ssl.SSLError) and cause.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST"):
            return SiteError(f"{superlink} does not speak TLS: check node.superlink")
    return None


def _explain_certificate(error: ssl.SSLCertVerificationError, superlink: str) -> str:
    if error.verify_code == _EXPIRED:
        return (
            f"the certificate of the SuperLink at {superlink} has ended, or this machine's clock is ahead: the "
            "server's operator runs `fedloom federation renew`"
        )
    if error.verify_code == _NOT_YET:
        return f"the certificate of the SuperLink at {superlink} is not valid yet: is this machine's clock behind?"
    if error.verify_code in _NAME:
        return f"the SuperLink's certificate is for another name than {superlink}: check node.superlink"
    return (
        f"the certificate of {superlink} is not of this federation's CA ({error.verify_message}): check "
        "node.root_certificates, and ask the server's operator for the ca.pem of today"
    )


def _explain_status(response: httpx.Response, superlink: str) -> SiteError | None:
    code = response.status_code
    told = FlowerError.from_json(response.text)
    if told is not None and told.code == ApiErrorCode.FLEET_RUN_STATUS_NOT_ALLOWED:
        raise RunOver
    if told is not None and told.code == ApiErrorCode.RUNTIME_VERSION_INCOMPATIBLE:
        return NotLetInError(
            f"the SuperLink's Flower is of another version ({to_printable(told.message)}): install its flwr here"
        )
    if code == HTTPStatus.UNAUTHORIZED:
        return _explain_signature(response)
    if code in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
        return NotLetInError(
            f"what answers at {superlink} has no Fleet API of flwr: check node.superlink, and the proxy's rules there"
        )
    if code < HTTPStatus.INTERNAL_SERVER_ERROR:
        words = to_printable(told.message if told else response.reason_phrase)
        return NotLetInError(f"the SuperLink at {superlink} refuses this site: {code} {words}")
    return None


def _explain_signature(response: httpx.Response) -> NotLetInError:
    """Flower says the same of a clock that is off and of a key that it does not know; its own clock is in the reply."""
    ahead = seconds_ahead(response)
    if ahead is not None and not -BEHIND_SECONDS < ahead < AHEAD_SECONDS - 1:  # Date has whole seconds
        way = "ahead of" if ahead > 0 else "behind"
        return NotLetInError(
            f"this machine's clock is {abs(ahead):.0f} s {way} the SuperLink's, and Flower refuses signatures of "
            "another time: set the clock (NTP), then start the node again"
        )
    return NotLetInError(
        "the SuperLink does not know this site's key, or no more: the server's operator sees with `fedloom federation "
        "list` whether it is registered or revoked, registers it with `fedloom federation register`, or gives the site "
        "a new one with `fedloom federation rotate`"
    )


def seconds_ahead(response: httpx.Response) -> float | None:
    """How far this machine's clock is ahead of the one that the reply tells, to a second or two; None where it tells
    none.
    """
    try:
        return time.time() - parsedate_to_datetime(response.headers["date"]).timestamp()
    except (KeyError, ValueError, TypeError):
        return None
