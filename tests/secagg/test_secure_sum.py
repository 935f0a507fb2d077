"""The sum is exact whoever vanishes; a server or a site that cheats is refused."""

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from fedloom.errors import SecureSumError
from fedloom.secagg import Collector, Member, Session
from fedloom.secagg.masks import unpack_vector
from fedloom.secagg.messages import put_by_site, put_list, take_by_site
from fedloom.secagg.session import MOST_SITES
from secagg_cohort import IDENTITIES, NONCE, ROSTER, Cohort, session_of

PHASES = ("announce", "share", "mask", "agree", "open")


@settings(max_examples=25)
@given(st.data())
def test_the_sum_is_exact_whoever_vanishes_at_whatever_phase(data):
    count = data.draw(st.integers(2, 8))
    session = session_of(count, values=9, bits=data.draw(st.integers(1, 32)))
    when = data.draw(
        st.dictionaries(st.sampled_from(session.sites), st.sampled_from(PHASES), max_size=count - session.threshold)
    )
    vanish = {phase: [name for name, at in when.items() if at == phase] for phase in PHASES}
    cohort = Cohort(session).play(vanish)
    total, summed, liars = cohort.collector.total()
    there = [name for name in session.sites if when.get(name, "open") in ("agree", "open")]
    assert list(summed) == there and not liars
    assert total.tolist() == cohort.sum_of(there)


def test_a_vector_under_masks_looks_like_noise():
    session = session_of(4, values=40_000, bits=8)
    cohort = Cohort(session)
    cohort.vectors = dict.fromkeys(session.sites, np.zeros(session.values, np.uint8))
    cohort.play(until="mask")
    sent = [unpack_vector(message, session.values, 8, "it") for message in cohort.sent["mask"].values()]
    for vector in sent:
        counts = np.bincount(vector, minlength=256)
        expected = session.values / 256
        # χ² of 255 degrees of freedom: mean 255, deviation 22.6; ten deviations never happen by chance.
        assert ((counts - expected) ** 2 / expected).sum() < 255 + 226
    # Two sites' masks have nothing in common, and no two but all together give the sum.
    assert abs(np.corrcoef(sent[0], sent[1])[0, 1]) < 0.05
    for some in ([0, 1], [0, 1, 2], [0, 1, 2, 3]):
        part = sum(sent[number].astype(int) for number in some) % 256
        assert np.count_nonzero(part) > 0.9 * session.values


def test_below_the_threshold_nothing_is_opened():
    cohort = Cohort(session_of(6)).play({"mask": ["site00"]}, until="agree")
    with pytest.raises(
        SecureSumError, match="only 4 of 6 sites have signed the list, 5 are needed; not site00, site05"
    ):
        del cohort.collector._signed[5]
        cohort.collector.agreed()
    with pytest.raises(SecureSumError, match="only 4 of 6 sites have sent their vectors"):
        Cohort(session_of(6)).play({"mask": ["site00", "site01"]})


def test_a_member_signs_one_list_and_opens_one_secret_of_each():
    cohort = Cohort(session_of(4)).play(until="agree")
    member = cohort.members["site00"]
    other = put_list([0, 1, 2], cohort.session)
    with pytest.raises(SecureSumError, match="asked to agree after agree"):
        member.agree(other)
    with pytest.raises(SecureSumError, match="asked to mask after agree"):
        member.mask(b"", cohort.vectors["site00"])


def test_a_server_that_tells_two_sites_two_lists_opens_nothing():
    """It would have the own masks of those on one list, and the pairs' masks of the same site by the other."""
    cohort = Cohort(session_of(6)).play(until="mask")
    first, second = put_list([0, 1, 2, 3, 4], cohort.session), put_list([1, 2, 3, 4, 5], cohort.session)
    members = cohort.members
    signed = {place: members[f"site{place:02}"].agree(first if place < 3 else second) for place in range(1, 5)}
    signed[0], signed[5] = members["site00"].agree(first), members["site05"].agree(second)
    ones = put_by_site({place: signed[place] for place in (0, 1, 2)})
    with pytest.raises(SecureSumError, match="only 3 of 6 sites have signed the list: 5 are needed"):
        members["site00"].open(ones)
    with pytest.raises(SecureSumError, match="said to be signed by 'site03', does not bear that site's signature"):
        members["site01"].open(put_by_site({place: signed[place] for place in range(5)}))
    # And having refused, it opens nothing for a better list either.
    with pytest.raises(SecureSumError, match="asked to open after open"):
        members["site00"].open(ones)


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda entries: {p: e for p, e in entries.items() if p != 0}, "other keys for this site than it announced"),
        (lambda entries: {**entries, 1: entries[2]}, "the keys of site 'site01' does not bear"),
        (lambda entries: {p: entries[p] for p in (0, 1)}, "only 2 of 4 sites have announced"),
    ],
    ids=["without it", "another's keys", "too few"],
)
def test_a_server_that_forges_keys_is_refused(forge, said):
    cohort = Cohort(session_of(4)).play(until="announce")
    entries = take_by_site(cohort.collector.announced(), 128, cohort.session, "keys")
    with pytest.raises(SecureSumError, match=said):
        cohort.members["site00"].share(put_by_site(forge(entries)))


def test_keys_of_an_earlier_session_are_refused():
    earlier = Cohort(session_of(4)).play(until="announce")
    later = Cohort(session_of(4, nonce=bytes(16)))
    with pytest.raises(SecureSumError, match="what site 'site01' announces does not bear that site's signature"):
        later.collector.take_announced("site01", earlier.sent["announce"]["site01"])


def test_an_envelope_that_was_changed_or_turned_is_refused():
    cohort = Cohort(session_of(4)).play(until="share")
    good = take_by_site(cohort.collector.sealed_for("site00"), 82, cohort.session, "shares")
    broken = {**good, 1: good[1][:-1] + bytes([good[1][-1] ^ 1])}
    with pytest.raises(SecureSumError, match="what site 'site01' sealed for site 'site00' cannot be opened"):
        cohort.members["site00"].mask(put_by_site(broken), cohort.vectors["site00"])
    back = take_by_site(cohort.sent["share"]["site01"][32:], 82, cohort.session, "shares")  # its own, sent back to it
    with pytest.raises(SecureSumError, match="cannot be opened"):
        cohort.members["site01"].mask(put_by_site({0: back[0], 2: back[2], 3: back[3]}), cohort.vectors["site01"])


def test_messages_sent_twice_too_late_or_by_strangers_are_refused():
    cohort = Cohort(session_of(4)).play(until="mask")
    with pytest.raises(SecureSumError, match="'site00' speaks out of turn"):
        cohort.collector.take_masked("site00", cohort.sent["mask"]["site00"])
    with pytest.raises(SecureSumError, match="'site00' speaks out of turn"):
        cohort.collector.take_shares("site00", cohort.sent["share"]["site00"])
    with pytest.raises(SecureSumError, match="'nobody' is not of this secure sum"):
        cohort.collector.take_masked("nobody", b"")
    with pytest.raises(SecureSumError, match="phase 5 of a secure sum cannot end before phase 4"):
        cohort.collector.total()


def test_a_wrong_share_is_made_up_for_and_its_sender_named():
    cohort = Cohort(session_of(8))

    def lie(site, message):
        return bytes(33) + message[33:-33] + bytes(33) if site == "site01" else message

    cohort.play({"mask": ["site07"]}, {"open": lie})
    total, summed, liars = cohort.collector.total()
    assert liars == ("site01",)
    assert total.tolist() == cohort.sum_of(summed) and "site07" not in summed and len(summed) == 7


def test_wrong_shares_beyond_the_spare_ones_end_the_sum():
    cohort = Cohort(session_of(4))
    wrong = {"open": lambda site, message: bytes(len(message)) if site in ("site01", "site02") else message}
    cohort.play(None, wrong)
    with pytest.raises(SecureSumError, match="the shares of site 'site00' do not give its secret.*more than 1 of the"):
        cohort.collector.total()


def test_messages_of_the_wrong_size_name_the_site():
    cohort = Cohort(session_of(4)).play(until="announce")
    cohort.collector.announced()
    with pytest.raises(SecureSumError, match="the shares of site 'site02': 5 bytes are no whole number"):
        cohort.collector.take_shares("site02", bytes(37))
    with pytest.raises(SecureSumError, match="'site02' has not sealed a share for every other"):
        cohort.collector.take_shares("site02", bytes(32))
    ready = Cohort(session_of(4)).play(until="share")
    ready.collector.sealed_for("site00")
    with pytest.raises(SecureSumError, match="the masked vector of site 'site03' has 2 bytes: expected 125"):
        ready.collector.take_masked("site03", b"ab")
    with pytest.raises(SecureSumError, match=r"a vector of shape \(3,\): expected \(50,\)"):
        ready.members["site01"].mask(ready.collector.sealed_for("site01"), np.zeros(3, np.uint32))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"sites": ("b", "a")}, "in order, and each named once"),
        ({"sites": ("a", "a")}, "in order, and each named once"),
        ({"sites": ("a",), "threshold": 1}, "of 1 sites: expected 2 to 1000"),
        ({"threshold": 2}, "with a threshold of 2: expected 3 to 4"),
        ({"threshold": 5}, "with a threshold of 5: expected 3 to 4"),
        ({"bits": 33}, "33 bits"),
        ({"nonce": b""}, "a nonce of 0 bytes"),
        ({"values": 0}, "0 values"),
    ],
)
def test_a_session_that_makes_no_sense_is_refused(fields, said):
    plain = {
        "job": "j",
        "round": 1,
        "nonce": NONCE,
        "sites": ("a", "b", "c", "d"),
        "threshold": 3,
        "values": 1,
        "bits": 8,
    }
    with pytest.raises(SecureSumError, match=said):
        Session(**{**plain, **fields})
    assert Session(**plain).tolerates == 1
    assert MOST_SITES == 1000


def test_a_site_whose_key_nobody_knows_takes_no_part():
    session = session_of(3)
    with pytest.raises(SecureSumError, match="site 'site00' does not know the keys of site02"):
        Member(session, "site00", IDENTITIES["site00"], {name: ROSTER[name] for name in ("site00", "site01")})
    stranger = Member(session, "site01", Ed25519PrivateKey.generate(), ROSTER)
    with pytest.raises(SecureSumError, match="what site 'site01' announces does not bear"):
        Collector(session, ROSTER).take_announced("site01", stranger.announce())


def test_two_sessions_share_no_mask():
    session = session_of(3, values=100)
    one, two = Cohort(session).play(until="mask"), Cohort(session).play(until="mask")
    assert all(one.sent["mask"][name] != two.sent["mask"][name] for name in session.sites)
