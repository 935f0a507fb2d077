"""The sum in progress on the server's disk, so that a server that is killed goes on with that very sum.

It could not begin another one with the same vectors: a site gives each out once (`site.sums`). The file is one line of
JSON about the sum, and then an entry for each message of a site, and for each phase that is over. A phase is over
before anything of the next one is sent; what a site then says in it again counts no more.

    entry   phase, 1 byte | bytes of the site's name, 2 | bytes of its message, 4 | name | message | CRC-32, 4
"""

from __future__ import annotations

import json
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

from fedloom.secagg import PHASES, Invitation, Phase
from fedloom.secagg.play import Ask

_HEAD = struct.Struct(">BHI")


class Journal:
    """The messages of one sum. path: of the file, in the run's folder.

    invitation: of the sum that a killed server had begun of this very round, None where there is none. rests_on: names
    the run, the round and the state that the vectors rest on.
    """

    def __init__(self, path: Path, rests_on: str) -> None:
        self.path, self.rests_on = path, rests_on
        self.invitation: Invitation | None = None
        self._replies: dict[str, dict[str, bytes]] = {phase: {} for phase in PHASES}
        self._closed: set[str] = set()
        self._read()

    def begin(self, invitation: Invitation) -> None:
        """Have a new sum on disk before any site is told of it."""
        said = {"rests_on": self.rests_on, "invitation": invitation.write().hex()}
        partial = self.path.with_suffix(".partial")
        with open(partial, "wb") as file:
            file.write(json.dumps(said).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, self.path)
        self.invitation = invitation

    def keep(self, ask: Ask) -> Ask:
        """The same, with what was said before said again, and everything new on disk before it counts."""

        def kept(phase: Phase, messages: Mapping[str, bytes]) -> Iterator[tuple[str, bytes]]:
            held = self._replies[phase]
            yield from list(held.items())
            if phase in self._closed:
                return
            for site, reply in ask(phase, {site: told for site, told in messages.items() if site not in held}):
                self._append(phase, site, reply)
                yield site, reply
            self._append(phase, "", b"")

        return kept

    def _append(self, phase: Phase, site: str, message: bytes) -> None:
        name = site.encode(errors="surrogatepass")
        entry = _HEAD.pack(PHASES.index(phase), len(name), len(message)) + name + message
        with open(self.path, "ab") as file:
            file.write(entry + zlib.crc32(entry).to_bytes(4, "big"))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        """Take up what is there of this round; an entry that a crash cut short was never acted upon."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        line, _, rest = content.partition(b"\n")
        try:
            said = json.loads(line)
        except ValueError:
            return
        if said.get("rests_on") != self.rests_on:
            return
        self.invitation = Invitation.read(bytes.fromhex(said["invitation"]))
        whole = 0
        for phase, site, message, end in _entries(rest):
            whole = end
            if site:
                self._replies[phase][site] = message
            else:
                self._closed.add(phase)
        os.truncate(self.path, len(line) + 1 + whole)


def _entries(content: bytes) -> Iterator[tuple[str, str, bytes, int]]:
    """(phase, site, message, where the entry ends) of every whole entry."""
    begin = 0
    while begin + _HEAD.size <= len(content):
        place, name, size = _HEAD.unpack_from(content, begin)
        end = begin + _HEAD.size + name + size
        if zlib.crc32(content[begin:end]).to_bytes(4, "big") != content[end : end + 4] or place >= len(PHASES):
            return
        at = begin + _HEAD.size
        site = content[at : at + name].decode(errors="surrogatepass")
        yield PHASES[place], site, content[at + name : end], end + 4
        begin = end + 4
