"""A slow and broken line on a fast machine: a TCP proxy on loopback.

Each direction has a rate and a delay: it is one token bucket that all connections share. A piece leaves when the pieces
before it have, and arrives a delay later; the sender is held up meanwhile, as by a line that is full. Of a piece's
packets some may be lost: they take their time on the line once more, and the piece arrives a trip there and back later,
with all that is behind it in its connection. There is no slow start, and a loss makes no sender slower, so real lines
are slower, never faster. A cut resets every connection and refuses new ones for a while; what was under way is gone.
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import NamedTuple, Self

PIECE = 16384
"""Bytes that pass as one."""
PACKET = 1460
"""Bytes of a packet, for losses: what Ethernet leaves for TCP's content."""
BUFFER = 65536
"""Bytes that the proxy's own sockets hold, so that a sender notices soon how slow the line is."""


class Passage(NamedTuple):
    """When a piece has left, and when it arrives."""

    left: float
    arrives: float


class Lane:
    """One direction: bytes a second, seconds from one end to the other, the share of packets that are lost.

    cuts: after how many bytes the whole line is cut. passed: bytes that were handed to the line, those included that a
    cut swallowed; not those that the line itself repeated.
    """

    def __init__(self, rate: float, delay: float, loss: float = 0.0, cuts: Sequence[int] = (), seed: int = 0) -> None:
        self.rate = rate
        self.delay = delay
        self.loss = loss
        self.passed = 0
        self._cuts = sorted(cuts)
        self._chance = random.Random(seed)
        self._free = 0.0

    def take(self, size: int, now: float) -> Passage:
        """When a piece of so many bytes, that is ready now, has left, and when it arrives."""
        lost = sum(self._chance.random() < self.loss for _ in range(0, size, PACKET)) if self.loss else 0
        self._free = max(self._free, now) + (size + lost * PACKET) / self.rate
        self.passed += size
        return Passage(self._free, self._free + self.delay * (3 if lost else 1))

    def breaks(self) -> bool:
        """Whether a cut is due; it is said once."""
        if self._cuts and self.passed >= self._cuts[0]:
            del self._cuts[0]
            return True
        return False


class Link:
    """The proxy to a port of this machine, in a thread of its own. Use as a context manager; `port` is its own.

    outage: seconds for which nobody connects after a cut. cuts: how many there were.
    """

    def __init__(self, target: int, up: Lane, down: Lane, outage: float = 0.0) -> None:
        self.target = target
        self.up = up
        self.down = down
        self.outage = outage
        self.port = 0
        self.cuts = 0
        self._back = 0.0
        self._ends: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def cut(self) -> None:
        """Reset every connection; called in the proxy's own thread."""
        self.cuts += 1
        self._back = self._loop.time() + self.outage
        for end in self._ends:
            _reset(end)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        listener = socket.create_server(("127.0.0.1", 0))
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER)
        server = await asyncio.start_server(self._connected, sock=listener, limit=PIECE)
        self.port = listener.getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._loop.time() < self._back:
            _reset(writer)
            return
        there, back = await asyncio.open_connection("127.0.0.1", self.target, limit=PIECE)
        ends = {writer, back}
        self._ends |= ends
        try:
            await asyncio.gather(self._carry(reader, back, self.up), self._carry(there, writer, self.down))
        except (OSError, asyncio.CancelledError):  # a line that broke, also one that nobody is left to tell
            pass
        finally:
            self._ends -= ends
            for end in ends:
                end.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lane: Lane) -> None:
        """Everything from one end to the other, at the lane's pace."""
        clock = self._loop.time
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            while True:
                due, piece = await under_way.get()
                await asyncio.sleep(due - clock())
                if not piece:
                    writer.write_eof()
                    return
                writer.write(piece)
                await writer.drain()

        arrivals = asyncio.create_task(arrive())
        try:
            while piece := await reader.read(PIECE):
                left, arrives = lane.take(len(piece), clock())
                under_way.put_nowait((arrives, piece))
                await asyncio.sleep(left - clock())
                if lane.breaks():
                    self.cut()
            under_way.put_nowait((clock() + lane.delay, b""))
            await arrivals
        finally:
            arrivals.cancel()


def _reset(end: asyncio.StreamWriter) -> None:
    """Close it as a line that broke does: with a reset, and without what was still to be sent."""
    held = end.get_extra_info("socket")
    held.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    end.transport.abort()
