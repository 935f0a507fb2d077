"""Messages as bytes. docs/wire-format.md is the format; `encode` and `decode` are inverse, bit by bit."""

from fedloom.compress.quantize import VALUE_KINDS, quantize
from fedloom.wire.codec import VERSION, decode, encode, read_header
from fedloom.wire.describe import Description, describe
from fedloom.wire.limits import DEFAULT, Limits
from fedloom.wire.message import Header, Message

__all__ = [
    "DEFAULT",
    "VALUE_KINDS",
    "VERSION",
    "Description",
    "Header",
    "Limits",
    "Message",
    "decode",
    "describe",
    "encode",
    "quantize",
    "read_header",
]
