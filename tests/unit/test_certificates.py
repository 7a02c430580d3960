"""The operator's own certificate authority, in virtual time."""

from __future__ import annotations

import datetime as dt
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from forebay_operator.certificates.authority import (
    CA,
    CA_KEY,
    CA_LASTS,
    LEAF,
    LEAF_KEY,
    LEAF_LASTS,
    OVERLAP,
    expires_at,
    renew,
)

NAME = "forebay-operator.serving.svc"
START = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
MINUTE, DAY = dt.timedelta(minutes=1), dt.timedelta(days=1)
CA_DUE = CA_LASTS * 2 / 3
LEAF_DUE = LEAF_LASTS * 2 / 3


class Operators:
    """The Secret and the ConfigMap over time, looked at once a day."""

    def __init__(self, found: dict[str, bytes] | None = None) -> None:
        self.found = found or {}
        self.published = b""
        self.now = START

    def look(self, *, publish: bool = True) -> dict[str, bytes]:
        self.found = dict(renew(self.found, [self.published], NAME, self.now))
        if publish:
            self.published = self.found[CA]
        return self.found

    def until(self, end: dt.datetime, **options: bool) -> dict[str, bytes]:
        while self.now < end:
            self.now = min(end, self.now + DAY)
            self.look(**options)
        return self.found


@pytest.fixture
def operators():
    new = Operators()
    new.look()
    return new


def authorities(pem: bytes) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(pem)


def certificate(found: dict[str, bytes]) -> x509.Certificate:
    return x509.load_pem_x509_certificate(found[LEAF])


def accepted(bundle: bytes, leaf: bytes, now: dt.datetime) -> bool:
    """Whether an EPP with this bundle would accept this leaf: X.509's own verifier."""
    verifier = (
        x509.verification.PolicyBuilder()
        .store(x509.verification.Store(authorities(bundle)))
        .time(now)
        .build_server_verifier(x509.DNSName(NAME))
    )
    try:
        verifier.verify(x509.load_pem_x509_certificate(leaf), [])
    except x509.verification.VerificationError:
        return False
    return True


def test_an_empty_secret_gets_a_ca_and_a_leaf_of_90_days(operators, tmp_path):
    """TLS takes the pair, and who knows the CA accepts it under the operator's name."""
    found = operators.found

    assert set(found) == {CA, CA_KEY, LEAF, LEAF_KEY}
    assert accepted(found[CA], found[LEAF], START)
    assert expires_at(found[LEAF]) == START + dt.timedelta(days=90)
    for name, pem in found.items():
        (tmp_path / name).write_bytes(pem)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / LEAF, tmp_path / LEAF_KEY)


def test_nothing_is_written_while_nothing_is_due(operators):
    """The same object comes back, also right before two thirds of a leaf's life."""
    found = operators.found
    early = START + LEAF_DUE - dt.timedelta(hours=2)

    assert renew(found, [found[CA]], NAME, START) is found
    assert renew(found, [found[CA]], NAME, early) is found


def test_the_leaf_is_replaced_at_two_thirds_of_its_life(operators):
    """By the same CA, with a key of its own."""
    before = operators.found

    operators.now = START + LEAF_DUE
    after = operators.look()

    assert after[CA] == before[CA]
    assert after[LEAF_KEY] != before[LEAF_KEY]
    assert expires_at(after[LEAF]) == operators.now + LEAF_LASTS


def test_a_new_ca_is_known_for_a_week_before_it_is_needed(operators):
    """The leaf goes on being the old CA's, and the bundle has both."""
    old = authorities(operators.found[CA])

    found = operators.until(START + CA_DUE)

    both = authorities(found[CA])
    assert both[1:] == old
    assert certificate(found).issuer == old[0].subject
    leaf = found[LEAF]
    operators.until(operators.now + OVERLAP - DAY)
    assert operators.found[LEAF] == leaf
    operators.until(operators.now + DAY)
    assert certificate(operators.found).issuer == both[0].subject


def test_the_key_of_a_replaced_ca_is_forgotten(operators):
    """It has signed a leaf that outlasts the week, so it is not needed any more."""
    before = operators.found[CA_KEY]

    found = operators.until(START + CA_DUE)

    assert found[CA_KEY] != before
    key = serialization.load_pem_private_key(found[CA_KEY], None)
    assert key.public_key() == authorities(found[CA])[0].public_key()
    assert expires_at(found[LEAF]) == operators.now + LEAF_LASTS


def test_the_old_ca_is_known_for_a_week_after_it_was_needed(operators):
    """For replicas and EPPs that are late; then the bundle has one CA again."""
    operators.until(START + CA_DUE)

    found = operators.until(operators.now + 2 * OVERLAP - DAY)
    assert len(authorities(found[CA])) == 2
    found = operators.until(operators.now + DAY)
    assert len(authorities(found[CA])) == 1


def test_no_picker_ever_has_to_refuse(operators):
    """Over seven years, also with a bundle that is two days old and a leaf that is."""
    bundles, leaves = [operators.found[CA]], [operators.found[LEAF]]
    rotations = 0
    for _ in range(7 * 365):
        operators.now += DAY
        found = operators.look()
        rotations += found[CA] != bundles[-1]
        bundles.append(found[CA])
        leaves.append(found[LEAF])
        for bundle in set(bundles[-3:]):
            for leaf in set(leaves[-3:]):
                assert accepted(bundle, leaf, operators.now), operators.now

    assert rotations == 6  # three times a CA comes, and three times one goes


def test_a_leaf_waits_until_its_ca_is_published(operators):
    """A ConfigMap that cannot be written must not make EPPs refuse."""
    old = authorities(operators.found[CA])[0]
    operators.until(START + CA_DUE, publish=False)
    operators.until(operators.now + 4 * OVERLAP, publish=False)
    assert certificate(operators.found).issuer == old.subject

    operators.until(operators.now + DAY)
    operators.until(operators.now + DAY)

    assert certificate(operators.found).issuer != old.subject


@pytest.mark.parametrize("lost", [CA, CA_KEY, LEAF, LEAF_KEY])
@pytest.mark.parametrize("now_there", [b"", b"nonsense", b"-----BEGIN CERTIFICATE-----\nx"])
def test_what_cannot_be_used_is_replaced(operators, lost, now_there):
    """Whatever became of one key of the Secret, what follows is complete and fits."""
    before = {**operators.found, lost: now_there}

    found = renew(before, [before[CA]], NAME, START + DAY)

    assert accepted(found[CA], found[LEAF], START + DAY)
    again = renew(found, [found[CA]], NAME, START + DAY)
    assert again is found


def test_a_ca_whose_key_is_lost_is_replaced_without_haste(operators):
    """Its leaf is served on while EPPs learn the new CA."""
    before = {**operators.found, CA_KEY: b""}

    found = renew(before, [before[CA]], NAME, START + DAY)

    assert found[LEAF] == before[LEAF]
    assert authorities(found[CA])[1:] == authorities(before[CA])


def test_keys_that_belong_to_another_certificate_are_not_used(operators):
    """Half of a pair that was replaced by hand."""
    other = Operators()
    other.look()
    before = {**operators.found, LEAF_KEY: other.found[LEAF_KEY]}

    found = renew(before, [before[CA]], NAME, START)

    assert found[CA] == before[CA]
    assert found[LEAF] != before[LEAF]


def test_another_name_needs_another_leaf(operators):
    """The release was reinstalled under another name."""
    found = renew(operators.found, [operators.published], "other.svc", START)

    names = certificate(found).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    assert names.value.get_values_for_type(x509.DNSName) == ["other.svc"]
    assert found[CA] == operators.found[CA]


@pytest.mark.parametrize("jump", [-400 * DAY, -DAY, CA_LASTS + DAY, 10 * CA_LASTS])
def test_a_clock_that_jumps_leaves_a_certificate_that_is_valid_now(operators, jump):
    """Back before anything was issued, or past the end of everything; and back again."""
    operators.now = START + jump
    there = operators.look()
    assert accepted(there[CA], there[LEAF], operators.now)

    operators.now = START + MINUTE
    back = operators.look()
    assert accepted(back[CA], back[LEAF], operators.now)
