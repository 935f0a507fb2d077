"""A slow line on a fast machine: a TCP proxy on loopback with a rate for each direction and a delay.

Every direction is one token bucket that all connections share: a piece leaves when the pieces before it have, and
arrives a delay later; the sender is held up meanwhile, as by a line that is full. There is no loss and no slow start,
so real lines of the same rate are slower, never faster.
"""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Self

PIECE = 16384
"""Bytes that pass as one."""


class Lane:
    """One direction: bytes a second, and seconds from one end to the other."""

    def __init__(self, rate: float, delay: float) -> None:
        self.rate = rate
        self.delay = delay
        self._free = 0.0

    def take(self, size: int, now: float) -> float:
        """When a piece of so many bytes, that is ready now, has left."""
        self._free = max(self._free, now) + size / self.rate
        return self._free


class Link:
    """The proxy to a port of this machine, in a thread of its own. Use as a context manager; `port` is its own."""

    def __init__(self, target: int, up: Lane, down: Lane) -> None:
        self.target = target
        self.up = up
        self.down = down
        self.port = 0
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

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._stop = asyncio.Event()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0, limit=PIECE)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._stop.wait()
        server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection("127.0.0.1", self.target, limit=PIECE)
        try:
            await asyncio.gather(_carry(reader, back, self.up), _carry(there, writer, self.down))
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            for end in (writer, back):
                end.close()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, lane: Lane) -> None:
    """Everything from one end to the other, at the lane's pace."""
    clock = asyncio.get_running_loop().time
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
    while piece := await reader.read(PIECE):
        left = lane.take(len(piece), clock())
        under_way.put_nowait((left + lane.delay, piece))
        await asyncio.sleep(left - clock())
    under_way.put_nowait((clock() + lane.delay, b""))
    await arrivals
