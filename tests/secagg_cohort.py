"""A cohort of sites and a server that play a secure sum, with what each phase is to do differently."""

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedloom.secagg import Collector, Member, Session, least_threshold

NONCE = bytes(range(16))
IDENTITIES = {f"site{number:02}": Ed25519PrivateKey.generate() for number in range(20)}
ROSTER = {name: key.public_key() for name, key in IDENTITIES.items()}


def session_of(count, *, threshold=0, values=50, bits=20, nonce=NONCE, round=1):
    names = tuple(sorted(IDENTITIES)[:count])
    return Session("job", round, nonce, names, threshold or least_threshold(count), values, bits)


class Cohort:
    """members: by name; sent: phase → site → its message; vectors: name → integers."""

    def __init__(self, session, seed=0):
        draw = np.random.default_rng(seed)
        self.session = session
        self.collector = Collector(session, ROSTER)
        self.members = {name: Member(session, name, IDENTITIES[name], ROSTER) for name in session.sites}
        self.vectors = {
            name: draw.integers(0, 2**session.bits, session.values, dtype=np.uint64).astype(np.uint32)
            for name in session.sites
        }
        self.sent = {phase: {} for phase in ("announce", "share", "mask", "agree", "open")}

    def play(self, vanish=None, changed=None, until="open"):
        """The phases in order. vanish: phase → sites silent from there; changed: phase → (site, message) → message."""
        gone, collector = set(), self.collector
        steps = {
            "announce": (lambda name: self.members[name].announce(), collector.take_announced),
            "share": (lambda name: self.members[name].share(collector.announced()), collector.take_shares),
            "mask": (
                lambda name: self.members[name].mask(collector.sealed_for(name), self.vectors[name]),
                collector.take_masked,
            ),
            "agree": (lambda name: self.members[name].agree(collector.present()), collector.take_agreed),
            "open": (lambda name: self.members[name].open(collector.agreed()), collector.take_opened),
        }
        for phase, (act, take) in steps.items():
            gone |= set((vanish or {}).get(phase, ()))
            # Whatever was sent in a phase is there before the next begins, in an order of its own.
            messages = {name: act(name) for name in reversed(self.session.sites) if name not in gone}
            for name, message in messages.items():
                alter = (changed or {}).get(phase, lambda site, message: message)
                self.sent[phase][name] = alter(name, message)
                take(name, self.sent[phase][name])
            if phase == until:
                return self
        return self

    def sum_of(self, names):
        total = sum(self.vectors[name].astype(np.uint64) for name in names)
        return (total & (2**self.session.bits - 1)).tolist()
