"""Keys of one session: signed where they are announced, agreed on in pairs, and what is sealed with them.

X25519 for the agreement (RFC 7748), Ed25519 for signatures, ChaCha20-Poly1305 for what is sealed, all of them from the
library cryptography.
"""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from fedloom.errors import SecureSumError
from fedloom.secagg.session import Session, hash_parts

KEY_BYTES = 32
SIGNATURE_BYTES = 64
TAG_BYTES = 16


def agree(private: bytes, public: bytes) -> bytes:
    """The 32 bytes that two key pairs share. Raises SecureSumError for a public key that gives none."""
    try:
        return X25519PrivateKey.from_private_bytes(private).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # a point of low order: everybody would know the secret
        raise SecureSumError("a public key that agrees on nothing secret") from None


def public_of(private: bytes) -> bytes:
    """The public key of a private one, both 32 bytes."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def seal(shared: bytes, session: Session, sender: int, receiver: int, content: bytes) -> bytes:
    """The content for the receiver alone, 16 bytes longer. A key seals once: it is of this session and this way."""
    key, bound = _sealing(shared, session, sender, receiver)
    return ChaCha20Poly1305(key).encrypt(bytes(12), content, bound)


def unseal(shared: bytes, session: Session, sender: int, receiver: int, sealed: bytes) -> bytes:
    """What was sealed. Raises SecureSumError for anything else."""
    key, bound = _sealing(shared, session, sender, receiver)
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), sealed, bound)
    except InvalidTag:
        raise SecureSumError(
            f"what site {session.sites[sender]!r} sealed for site {session.sites[receiver]!r} cannot be opened: it was "
            "changed on its way, or is of another sum"
        ) from None


def _sealing(shared: bytes, session: Session, sender: int, receiver: int) -> tuple[bytes, bytes]:
    way = sender.to_bytes(2, "big") + receiver.to_bytes(2, "big")
    return hash_parts(b"seal", session.digest, way, shared), session.digest + way


def check_signature(key: Ed25519PublicKey, signature: bytes, signed: bytes, what: str) -> None:
    """Raises SecureSumError unless the key's owner has signed."""
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        raise SecureSumError(f"{what} does not bear that site's signature") from None
