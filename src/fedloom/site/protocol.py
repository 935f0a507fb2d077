"""What the shim and the worker say to one another over the unix socket, and within Flower's messages.

A parcel is a few named facts and any number of payloads. On the socket it is

    magic "FLWK" | length of the head, 4 bytes, big-endian | head: JSON {"facts": …, "sizes": […]} | the payloads

A request has a greeting of fixed size before it, so that the worker knows whom it hears before it reads more:

    magic "FLWT", or "FLWU" before a withdrawal | SHA-256 of the token, 32 bytes

Every length is checked before anything of that length is read. This module loads no torch: the shim is started anew
for every message.

Every request and every reply says the number of a protocol, so that a server and its sites need not be updated on the
same day. A request is written in the one that it names; a reply names the newest one that the site speaks. What came
before there were numbers counts as 1. A fact that nobody knows is not looked at: one that may be overlooked needs no
new number, one that must not be does.
"""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from fedloom.errors import SiteError, VersionError
from fedloom.filed import Sheet, slices
from fedloom.records.text import to_printable

Fact: TypeAlias = str | int | float | bool | None
MAGIC = b"FLWK"
GREETING = b"FLWT"
URGENT = b"FLWU"
"""Greets in place of `GREETING` where a withdrawal follows, which a worker takes while it trains."""
GREETING_BYTES = len(GREETING) + hashlib.sha256().digest_size
MOST_HEAD = 2**20
"""Bytes of a parcel's facts: the settings of a run take a few KiB."""
MOST_PAYLOADS = 2**12
"""Payloads of a parcel: the broadcasts that a site has missed are far fewer."""
MOST_BYTES = 2**33
"""Bytes of a parcel's payloads, whatever a site's own limit: twice the largest payload that the wire reads."""
WRONG_TOKEN = "the token is wrong"
"""The error that answers a greeting with another token."""
HEAD_SECONDS = 5.0
"""Time for a request's head. The relay writes it in one go, so only a caller that dawdles on purpose needs longer."""
SLOWEST = 2**20
"""Bytes a second: a request's payloads may take as long as they would at this rate, and `HEAD_SECONDS` more. Both ends
are on one machine, where a socket moves a thousand times as much."""
MOST_COUNT = 2**31 - 1
"""Of rounds, versions and steps: more than any run has, and a whole number in every program that reads a ledger."""
MOST_SECONDS = 1e8
"""Three years."""
MOST_TIME = 2.0**34
"""Seconds since 1970 in the year 2514: more is none that a calendar holds."""
MOST_LOSS = 1e9
"""A cross-entropy of 20 is that of a guess among all tokens; this leaves room for training that diverges."""

SINCE = {"protocol": 2, "time": 2, "expires": 2, "phase": 2}
"""Facts of a request that the first protocol did not have, and the one that they came with."""

Count: TypeAlias = Annotated[int, Field(ge=0, le=MOST_COUNT)]
Seconds: TypeAlias = Annotated[float, Field(ge=0, le=MOST_SECONDS, allow_inf_nan=False)]
PhaseName: TypeAlias = Literal["announce", "share", "mask", "agree", "open"]
Digest: TypeAlias = Annotated[str, Field(pattern="^[0-9A-Za-z:_-]*$", max_length=128)]


@dataclass(frozen=True, slots=True)
class Spoken:
    """The protocols that one side speaks: those of its own release and of the one before."""

    oldest: int
    newest: int

    def __str__(self) -> str:
        names = [str(number) for number in range(self.oldest, self.newest + 1)]
        return " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)

    def agree(self, said: int) -> int:
        """What a server speaks with a site whose newest protocol is `said`. Raises VersionError where that is too old.

        A newer site decides for itself, and says so.
        """
        if said < self.oldest:
            raise VersionError(
                f"the site speaks protocol {said}, this server {self} ({own_release()}): update the site"
            )
        return min(said, self.newest)


SPOKEN = Spoken(1, 2)
"""1: hello, turn, deliver. 2: numbers of protocols; the server's time; withdrawals, and how long a turn is worth
beginning."""
WITHDRAWS = 2
"""The first protocol in which a site can be asked to withdraw a turn."""
NEWEST_ALONE = 2
"""The first protocol whose sites take a broadcast that says all there is without the ones before it; others refuse it,
since it rests on a state that they do not have."""


@dataclass(frozen=True, slots=True)
class Parcel:
    """Named facts and payloads."""

    facts: Mapping[str, Fact]
    payloads: Sequence[bytes] = ()

    def used_up(self) -> Parcel:
        """The same with payloads in a list, out of which who reads them may take them, to have their memory back."""
        return Parcel(self.facts, list(self.payloads))


@dataclass(frozen=True, slots=True)
class Request:
    """What the server asks of a site.

    ask: "hello" (get ready for the job, and say where you stand), "turn" (bring yourself in step, train, answer),
    "withdraw" (leave the turn of `round`: train no further for it, send and keep nothing of it), "deliver" (bring
    yourself in step), or "sum" (here is the next message of a secure sum, of its `phase`). job: 16 hex digits;
    settings: the run's settings as TOML; base: digest of the server's base weights; counted: the last round in which
    the server counted an update of this site, 0 if none; time: the server's, in seconds since 1970, where it says it;
    expires: seconds that a turn is worth beginning, from when it was sent.
    """

    __pydantic_config__ = ConfigDict(extra="ignore", strict=True)
    ask: Literal["hello", "turn", "withdraw", "deliver", "sum"]
    job: Annotated[str, Field(pattern="^[0-9a-f]{16}$")]
    settings: Annotated[str, Field(max_length=2**18)]
    base: Digest
    round: Count = 0
    counted: Count = 0
    protocol: Count = 1
    time: Annotated[float, Field(ge=0, le=MOST_TIME, allow_inf_nan=False)] | None = None
    expires: Seconds | None = None
    phase: PhaseName | None = None


@dataclass(frozen=True, slots=True)
class Statement:
    """What a site says beside its payload. Nothing of it is needed, and what is not listed here is not looked at.

    name: in answer to "hello"; version, digest: the global state that it holds; loss: mean of its training, None where
    that is not finite; seconds: of its training; error: why it sends no update; protocol: the newest that it speaks;
    dropped: that a turn was not trained to its end because the server did not want it any more: it was "withdrawn", or
    had "expired" before it was begun. That is no error. phase: of a secure sum, that the payload answers; key: of a
    site that is ready for one, its lasting public key in hex digits; spent: that its vector has left in one already.
    """

    __pydantic_config__ = ConfigDict(extra="ignore", strict=True)
    name: Annotated[str, Field(max_length=200)] = ""
    version: Count | None = None
    digest: Digest | None = None
    loss: Annotated[float, Field(ge=0, le=MOST_LOSS, allow_inf_nan=False)] | None = None
    steps: Count = 0
    seconds: Seconds = 0.0
    error: str | None = None
    protocol: Count = 1
    dropped: Literal["withdrawn", "expired"] | None = None
    phase: PhaseName | None = None
    key: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    spent: bool = False


_REQUEST: TypeAdapter[Request] = TypeAdapter(Request)
_STATEMENT: TypeAdapter[Statement] = TypeAdapter(Statement)
_SIZES: TypeAdapter[list[int]] = TypeAdapter(
    Annotated[list[Annotated[int, Field(strict=True, ge=0, le=MOST_BYTES)]], Field(max_length=MOST_PAYLOADS)]
)


def own_release() -> str:
    """The installed fedloom, for messages about versions."""
    return f"fedloom {metadata.version('fedloom')}"


def write_facts(facts: Mapping[str, Fact], protocol: int) -> dict[str, Fact]:
    """A request's facts as a protocol has them: the later ones are left out, its number stands in it."""
    return {name: held for name, held in {**facts, "protocol": protocol}.items() if SINCE.get(name, 1) <= protocol}


def error_parcel(text: str) -> Parcel:
    """A site's reply where it has nothing but an error to tell."""
    return Parcel({"error": text, "protocol": SPOKEN.newest})


def parse_request(facts: Mapping[str, Fact], spoken: Spoken = SPOKEN) -> Request:
    """The request that the facts of a parcel make.

    Raises VersionError where it is of a protocol that this site does not speak, SiteError where it is no request.
    """
    said = facts.get("protocol", 1)
    if isinstance(said, int) and not spoken.oldest <= said <= spoken.newest:
        behind = "site" if said > spoken.newest else "server"
        raise VersionError(
            f"the server speaks protocol {said}, this site {spoken} ({own_release()}): update the {behind}"
        )
    try:
        return _REQUEST.validate_json(json.dumps(dict(facts)))
    except ValidationError as error:
        raise SiteError(f"no request that a worker knows: {_complaint(error)}") from None


def parse_statement(facts: Mapping[str, Fact]) -> Statement:
    """What the facts of a site's reply say. Raises SiteError where a number or a text is none that a site can have."""
    try:
        return _STATEMENT.validate_json(json.dumps(dict(facts)))
    except ValidationError as error:
        raise SiteError(f"the facts in its reply are wrong: {_complaint(error)}") from None


def _complaint(error: ValidationError) -> str:
    """The first fact that is wrong, and what was expected. The name of an unknown one is the other side's text."""
    first = error.errors(include_url=False, include_input=False)[0]
    where = f"{to_printable('.'.join(map(str, first['loc'])), 60)}: " if first["loc"] else ""
    return f"{where}{to_printable(first['msg'])}"


def parse_sizes(found: object, most: int = MOST_BYTES) -> list[int]:
    """Lengths of payloads, as another party wrote them. Raises SiteError if they are none, or over `most` bytes."""
    try:
        lengths = _SIZES.validate_python(found)
    except ValidationError as error:
        raise SiteError(f"the lengths of payloads are wrong: {error.errors()[0]['msg']}") from None
    if sum(lengths) > most:
        raise SiteError(f"payloads of {sum(lengths):,} bytes; at most {most:,} are taken")
    return lengths


def cut_payloads(content: bytes | memoryview, lengths: Sequence[int]) -> tuple[bytes, ...]:
    """The payloads that lie one after the other in `content`. Raises SiteError unless they fill it exactly."""
    if sum(lengths) != len(content):
        raise SiteError(f"{len(content):,} bytes of payloads arrived, {sum(lengths):,} were announced")
    if len(lengths) == 1 and isinstance(content, bytes):
        return (content,)
    view, ends, pieces = memoryview(content), 0, []
    for length in lengths:
        pieces.append(bytes(view[ends : ends + length]))
        ends += length
    return tuple(pieces)


def greeting(token: str, *, urgent: bool = False) -> bytes:
    """What a caller shows first. A digest has one length, and holds no text that could fail to decode."""
    return (URGENT if urgent else GREETING) + hashlib.sha256(token.encode(errors="surrogatepass")).digest()


def exchange(connection: socket.socket, token: str, parcel: Parcel) -> Parcel:
    """The worker's reply to a request. Raises OSError where it is lost, SiteError where it is not a reply."""
    # A worker that refuses hangs up before it has read all of it. Its reason is there to be read nevertheless.
    with suppress(ConnectionError):
        connection.sendall(greeting(token, urgent=parcel.facts.get("ask") == "withdraw"))
        send_parcel(connection, parcel)
    return receive_parcel(connection)


def send_parcel(connection: socket.socket, parcel: Parcel) -> None:
    """Write one parcel."""
    head = json.dumps({"facts": dict(parcel.facts), "sizes": [len(p) for p in parcel.payloads]}).encode()
    if len(head) > MOST_HEAD:
        raise SiteError(f"a head of {len(head):,} bytes; at most {MOST_HEAD:,} are allowed")
    connection.sendall(MAGIC + struct.pack(">I", len(head)) + head)
    for payload in parcel.payloads:
        for piece in slices(payload):
            connection.sendall(piece)


def receive_parcel(
    connection: socket.socket, most: int = MOST_BYTES, *, hurried: bool = False, folder: Path | None = None
) -> Parcel:
    """Read one parcel with payloads of `most` bytes at most.

    folder: where large payloads lie in files without a name (`filed`); None: in memory. hurried: hold the other side to
    `HEAD_SECONDS` and `SLOWEST`; otherwise it may take as long as it likes.
    Raises SiteError for anything other than a parcel, OSError where the other side hangs up or takes too long.
    """
    until = time.monotonic() + HEAD_SECONDS if hurried else None
    start = _take(connection, len(MAGIC) + 4, until)
    (length,) = struct.unpack(">I", start[len(MAGIC) :])
    if start[: len(MAGIC)] != MAGIC or length > MOST_HEAD:
        raise SiteError("these bytes are not a parcel of fedloom's")
    try:
        head = json.loads(_take(connection, length, until))
        facts, lengths = head["facts"], parse_sizes(head["sizes"], most)
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SiteError("the head of a parcel cannot be read") from None
    if not isinstance(facts, dict) or not all(isinstance(value, Fact) for value in facts.values()):
        raise SiteError("the facts of a parcel are not plain facts")
    until = time.monotonic() + HEAD_SECONDS + sum(lengths) / SLOWEST if hurried else None
    return Parcel(facts, tuple(_take(connection, size, until, folder) for size in lengths))


def _take(connection: socket.socket, length: int, until: float | None, folder: Path | None = None) -> bytes:
    """Exactly so many bytes, by then. Room is taken as they arrive, not as they are announced."""
    taken, missing = Sheet(folder, length), length
    while missing > 0:
        if until is not None:
            # Time left for all that is missing: a byte now and then does not buy more. 0 would mean not to block.
            connection.settimeout(max(until - time.monotonic(), 1e-3))
        piece = connection.recv(min(missing, 2**20))
        if not piece:
            raise ConnectionError("the other side hung up")
        missing -= taken.write(piece)
        if until is not None and time.monotonic() > until:
            raise TimeoutError(f"only {length - missing:,} of {length:,} bytes came in time")
    return taken.closed()
