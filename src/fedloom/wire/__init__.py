"""Messages as bytes. docs/wire-format.md is the format; `encode` and `decode` are inverse, bit by bit."""

from fedloom.wire.codec import VERSION, decode, encode, read_header
from fedloom.wire.describe import Description, describe
from fedloom.wire.lazy import LazyEntries, decode_lazily
from fedloom.wire.limits import DEFAULT, Limits
from fedloom.wire.message import Header, Message

__all__ = [
    "DEFAULT",
    "VERSION",
    "Description",
    "Header",
    "LazyEntries",
    "Limits",
    "Message",
    "decode",
    "decode_lazily",
    "describe",
    "encode",
    "read_header",
]
