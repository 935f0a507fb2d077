"""A SuperLink within the test's process: Flower's own application, without a port."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from flwr.supercore.control import ControlHttpClient
from flwr.superlink.main import create_app


class InProcess(httpx.BaseTransport):
    """Hands requests to the application."""

    def __init__(self) -> None:
        self.app = create_app()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return asyncio.run(self.asked(request.method, request.url.path, request.read(), dict(request.headers)))

    async def asked(self, method: str, path: str, content: bytes, headers: dict[str, str]) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="https://in-process") as client:
            answer = await client.request(method, path, content=content, headers=headers)
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)


def control_client() -> ControlHttpClient:
    """A client of the Control API of a new SuperLink that knows nobody."""
    client = ControlHttpClient("https://in-process")
    client._client.close()
    client._client = httpx.Client(transport=InProcess())
    return client


def connecting(client: ControlHttpClient):
    """Stands for `roster.connect_control`."""

    @contextmanager
    def connect(rules: object) -> Iterator[ControlHttpClient]:
        yield client

    return connect
