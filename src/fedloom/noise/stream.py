"""Random numbers that nobody can work out who does not have the key.

The state of an ordinary generator follows from its output, and the server knows the seed of a run. So whatever hides
data comes from an AES-256-CTR key stream: from a key that the system draws and nobody keeps, or from a site's secret
where the same draw has to be made again after a crash.
"""

from __future__ import annotations

import secrets
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

KEY_BYTES = 32


class SecretStream:
    """An endless row of random numbers; the same key gives the same row. Without a key a fresh one is drawn."""

    def __init__(self, key: bytes | None = None) -> None:
        from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

        key = secrets.token_bytes(KEY_BYTES) if key is None else key
        self._stream = Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> NDArray[np.unsignedinteger[Any]]:
        """Integers of 64 random bits."""
        import numpy as np

        return np.frombuffer(self._stream.update(bytes(8 * count)), dtype="<u8")

    def uniform(self, count: int) -> NDArray[np.float64]:
        """Values between 0 and 1, both excluded: the middles of 2^53 cells."""
        import numpy as np

        return ((self.words(count) >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53

    def normal(self, count: int) -> NDArray[np.float64]:
        """Independent N(0, 1) values, by Box and Muller's transform."""
        import numpy as np

        pairs = -(-count // 2)
        uniform = self.uniform(2 * pairs)
        radius, angle = np.sqrt(-2.0 * np.log(uniform[:pairs])), 2.0 * np.pi * uniform[pairs:]
        return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:count]

    def below(self, bound: int, count: int) -> NDArray[np.int64]:
        """Integers 0 … bound − 1, each exactly as likely: words beyond a multiple of the bound are drawn anew.

        bound: 1 to 2^62.
        """
        import numpy as np

        whole = np.uint64(2**64 // bound * bound - 1)  # the largest word that is taken
        found = self.words(count).copy()
        while (over := np.flatnonzero(found > whole)).size:
            found[over] = self.words(over.size)
        return (found % np.uint64(bound)).astype(np.int64)
