"""The small fields of header and index: bytes, texts and variable-length integers, each checked as it is read.

A varint is LEB128: seven bits a byte, lowest first, the top bit set on all but the last byte. Only the shortest form of
a number below 2⁶³ is valid.
"""

from __future__ import annotations

from fedloom.errors import WireError

VARINT_END = 2**63


class FieldWriter:
    """Appends fields to `data`."""

    def __init__(self) -> None:
        self.data = bytearray()

    def byte(self, value: int) -> None:
        """One byte."""
        self.data.append(value)

    def varint(self, value: int) -> None:
        """A whole number from 0 to 2⁶³ − 1."""
        if not 0 <= value < VARINT_END:
            raise WireError(f"the number {value} cannot be sent: expected 0 to 2^63 - 1")
        while value >= 0x80:
            self.data.append(value & 0x7F | 0x80)
            value >>= 7
        self.data.append(value)

    def sized_bytes(self, content: bytes) -> None:
        """A varint length, then the bytes."""
        self.varint(len(content))
        self.data += content


class FieldReader:
    """Takes fields from the front of `data`; every error says which field it was reading."""

    def __init__(self, data: memoryview, whole: str) -> None:
        self.data = data
        self.at = 0
        self.whole = whole

    @property
    def left(self) -> int:
        """Bytes not yet read."""
        return len(self.data) - self.at

    def take(self, size: int, what: str) -> memoryview:
        """The next `size` bytes."""
        if size > self.left:
            raise WireError(f"{self.whole} ends inside {what}: {size} bytes were announced, {self.left} are left")
        self.at += size
        return self.data[self.at - size : self.at]

    def byte(self, what: str) -> int:
        """One byte."""
        at = self.at
        if at >= len(self.data):
            self.take(1, what)  # says what is missing
        self.at = at + 1
        return self.data[at]

    def varint(self, what: str, most: int = VARINT_END - 1) -> int:
        """A whole number, at most `most`."""
        # An index is thousands of numbers, and most of them fill one byte.
        if self.at < len(self.data) and (byte := self.data[self.at]) < 0x80 and byte <= most:
            self.at += 1
            return byte
        value = shift = 0
        while True:
            byte = self.byte(what)
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
            if shift >= 63:  # nine bytes of seven bits are all of 63
                raise WireError(f"{what} is not below 2^63")
        # Equal numbers must give equal bytes: a last byte of zero could have been left away.
        if byte == 0 and shift > 7:
            raise WireError(f"{what} is written in more bytes than it needs")
        if value > most:
            raise WireError(f"{what} is {value:,}, more than the {most:,} that are allowed here")
        return value

    def sized_bytes(self, what: str, most: int) -> bytes:
        """A varint length of at most `most`, then the bytes."""
        return bytes(self.take(self.varint(f"the length of {what}", most), what))

    def end(self) -> None:
        """Raises WireError unless everything was read."""
        if self.left:
            raise WireError(f"{self.whole} has {self.left} bytes after its end")


def decode_text(content: bytes, what: str) -> str:
    """UTF-8 bytes as text."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise WireError(f"{what} is not UTF-8 text") from error
