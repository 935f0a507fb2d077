"""The nodes that a SuperLink knows, through its Control API: listed, let in, taken out."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from fedloom.errors import RoundError


@dataclass(frozen=True, slots=True)
class RegisteredNode:
    """One node. key: its public key in OpenSSH's format, without a comment.

    status: "registered" (it never came), "online", "offline" or "unregistered" (and its key never comes back). seen:
    when it was heard last, or taken out; "" where it never came. ISO 8601, UTC.
    """

    node_id: int
    name: str
    status: str
    key: bytes
    seen: str


def list_nodes(client: Any) -> list[RegisteredNode]:  # noqa: ANN401 (Flower's client is untyped)
    """All nodes, those that were taken out included, in the order in which they were registered."""
    from flwr.proto.control_pb2 import ListNodesRequest

    found = client.ListNodes(ListNodesRequest()).nodes_info
    return [
        RegisteredNode(int(node.node_id), str(node.name), str(node.status), _as_openssh(node.public_key), _seen(node))
        for node in sorted(found, key=lambda node: node.registered_at)
    ]


def register_node(client: Any, site: str, public_key: bytes) -> int:  # noqa: ANN401 (Flower's client is untyped)
    """Let a site in under a name: its node's public key, as OpenSSH writes it. Returns the node's number.

    Raises RoundError where the SuperLink has, or had, a node with this key.
    """
    import httpx
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
    from cryptography.hazmat.primitives.serialization import load_ssh_public_key
    from flwr.proto.control_pb2 import RegisterNodeRequest
    from flwr.supercore.error import ApiErrorCode, FlowerError
    from flwr.supercore.primitives.asymmetric import public_key_to_bytes

    key = load_ssh_public_key(public_key)
    if not isinstance(key, EllipticCurvePublicKey):
        raise RoundError(f"the public key of {site} is of another kind than ECDSA")
    try:
        made = client.RegisterNode(RegisterNodeRequest(public_key=public_key_to_bytes(key), name=site))
    except httpx.HTTPStatusError as error:
        refused = FlowerError.from_json(error.response.text)
        if refused is None or refused.code != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:
            raise
        raise RoundError(f"the SuperLink has the public key of {site} already, or had it and revoked it") from None
    return int(made.node_id)


def unregister_node(client: Any, node_id: int) -> None:  # noqa: ANN401 (Flower's client is untyped)
    """Take a node out. Its key never comes back: the SuperLink remembers it."""
    from flwr.proto.control_pb2 import UnregisterNodeRequest

    client.UnregisterNode(UnregisterNodeRequest(node_id=node_id))


def _seen(node: Any) -> str:  # noqa: ANN401 (Flower's message is untyped)
    if node.status == "online":
        from flwr.common.constant import HEARTBEAT_PATIENCE

        # Flower notes until when a node counts as there: its last sign of life, and so many intervals more.
        at = node.online_until - HEARTBEAT_PATIENCE * node.heartbeat_interval
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds")
    told = node.unregistered_at if node.status == "unregistered" else node.last_deactivated_at
    return datetime.fromisoformat(told).astimezone(UTC).isoformat(timespec="seconds") if told else ""


def _as_openssh(key: bytes) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
    from flwr.supercore.primitives.asymmetric import bytes_to_public_key

    return bytes_to_public_key(key).public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
