"""Masks: streams of integers modulo 2^bits from secrets of 32 bytes, and vectors as packed bytes."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

from fedloom.errors import SecureSumError
from fedloom.secagg.session import Session, hash_parts

Integers: TypeAlias = NDArray[np.unsignedinteger[Any]]

_CHUNK = 2**18
"""Values at a time: a mask as a whole is as large as the vector."""


def number_type(bits: int) -> np.dtype[Any]:
    """The narrowest unsigned type of at least so many bits; it wraps around at a multiple of 2^bits."""
    return np.dtype(next(f"<u{size}" for size in (1, 2, 4) if 8 * size >= bits))


def add_mask(total: Integers, secret: bytes, session: Session, *, subtract: bool = False) -> None:
    """Add the mask of a secret to `total` in place, or take it away: AES-256 in counter mode, a new key a session."""
    key = hash_parts(b"mask", session.digest, secret)
    stream = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    zeros = bytes(_CHUNK * total.itemsize)
    for begin in range(0, len(total), _CHUNK):
        part = total[begin : begin + _CHUNK]
        mask = np.frombuffer(stream.update(memoryview(zeros)[: part.nbytes]), total.dtype)
        if subtract:
            part -= mask
        else:
            part += mask


def pack_vector(vector: Integers, bits: int) -> bytes:
    """The lowest `bits` of every integer, side by side, highest first."""
    if bits == 8 * vector.itemsize:
        return vector.tobytes()
    size = 8 * vector.itemsize
    # Chunks of a multiple of eight values, so that each ends with a whole byte.
    pieces = (vector[begin : begin + _CHUNK] for begin in range(0, len(vector), _CHUNK))
    return b"".join(
        np.packbits(np.unpackbits(piece.byteswap().view(np.uint8)).reshape(-1, size)[:, size - bits :]).tobytes()
        for piece in pieces
    )


def packed_size(values: int, bits: int) -> int:
    """Bytes of a packed vector."""
    return -(-values * bits // 8)


def unpack_vector(packed: bytes, values: int, bits: int, what: str) -> Integers:
    """The integers that `pack_vector` was given, without what was above their lowest bits."""
    if len(packed) != packed_size(values, bits):
        raise SecureSumError(f"{what} has {len(packed):,} bytes: expected {packed_size(values, bits):,}")
    kind = number_type(bits)
    if bits == 8 * kind.itemsize:
        return np.frombuffer(packed, kind).copy()
    out = np.zeros(values, kind)
    flat = np.frombuffer(packed, np.uint8)
    for begin in range(0, values, _CHUNK):
        held = min(_CHUNK, values - begin)
        rows = np.unpackbits(flat[begin * bits // 8 :], count=held * bits).reshape(held, bits)
        wide = np.zeros((held, 8 * kind.itemsize), np.uint8)
        wide[:, -bits:] = rows
        out[begin : begin + held] = np.packbits(wide, axis=1).view(kind.newbyteorder(">")).ravel()
    return out
