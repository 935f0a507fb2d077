"""Secure aggregation: a server learns the sum of its sites' vectors and nothing else of them.

The protocol of Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning" (CCS 2017), in
its variant for a server that may lie: keys are signed, and sites agree on who is there before they open anything. Any
sites may vanish at any phase, as long as `Session.threshold` of them stay to the end.

    phase       a site sends                                   the server sends
    keys        two public keys, signed                        everybody's keys
    shares      shares of its two secrets, sealed for others   those that are sealed for the site
    masked      its vector under masks                         who has sent one
    agreement   its signature under that list                  everybody's signatures
    opening     one share of each site's secret

A `Member` is a site, a `Collector` the server; all that they exchange is bytes. Only numpy and cryptography are used.
A `Participant` is a member that answers one message after another, and `play_sum` the server's part as a whole.
"""

from fedloom.secagg.collector import Collector
from fedloom.secagg.fixed import Grid
from fedloom.secagg.invitation import Invitation, count_talk
from fedloom.secagg.masks import Integers, pack_vector, unpack_vector
from fedloom.secagg.member import PHASES, Member
from fedloom.secagg.participant import Participant, Phase
from fedloom.secagg.play import Sum, play_sum
from fedloom.secagg.session import NONCE_BYTES, Session, least_threshold

__all__ = [
    "NONCE_BYTES",
    "PHASES",
    "Collector",
    "Grid",
    "Integers",
    "Invitation",
    "Member",
    "Participant",
    "Phase",
    "Session",
    "Sum",
    "count_talk",
    "least_threshold",
    "pack_vector",
    "play_sum",
    "unpack_vector",
]
