"""Decides which certificates the control channel should have, from the existing ones and the time.

The operator is its own certificate authority (CA). A leaf lasts 90 days and a CA three years; each
is replaced after two thirds of that. EPPs learn CAs from a ConfigMap, so a new
CA is published for a week before the first leaf that it has signed is served, and the old one for a
week after. The last leaf that an old CA signs outlasts the first of these weeks; then its key is
dropped.

Everything here is PEM under the names that a Secret has for it: `ca.crt` (a bundle; the first one
signs), `ca.key`, `tls.crt` and `tls.key`. Reading and writing it belongs in issuing.py.
"""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

CA = "ca.crt"
CA_KEY = "ca.key"
LEAF = "tls.crt"
LEAF_KEY = "tls.key"

CA_LASTS = dt.timedelta(days=3 * 365)
LEAF_LASTS = dt.timedelta(days=90)
OVERLAP = dt.timedelta(days=7)
BACKDATED = dt.timedelta(hours=1)  # for clocks that are late

_Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class _Pair:
    certificate: x509.Certificate
    key: _Key

    def valid(self, now: dt.datetime) -> bool:
        return self._begins <= now < self.certificate.not_valid_after_utc

    def due(self, now: dt.datetime) -> bool:
        """Whether it is time for the next one."""
        lasts = self.certificate.not_valid_after_utc - self._begins
        return not self.valid(now) or now >= self._begins + lasts * 2 / 3

    def age(self, now: dt.datetime) -> dt.timedelta:
        return now - self._begins - BACKDATED

    @property
    def _begins(self) -> dt.datetime:
        return self.certificate.not_valid_before_utc


def renew(
    found: Mapping[str, bytes],
    published: Collection[bytes],
    server_name: str,
    now: dt.datetime,
) -> Mapping[str, bytes]:
    """Return what there should be: `found` itself when nothing is due.

    What cannot be used is replaced: an empty `found` leads to a new CA and its first leaf.

    Args:
        found: what there is.
        published: the CA bundles that EPPs can see.
        server_name: the DNS name that the leaf has to carry.
        now: the time of day.
    """
    before = _bundle(found.get(CA, b""))
    others = [ca for ca in before if ca.not_valid_after_utc > now]
    signer = _pair(before[0], found.get(CA_KEY, b"")) if before else None
    leaf = _leaf(found, others, server_name)
    kept = leaf
    if signer is None or signer.due(now):
        if signer is not None and signer.valid(now):
            leaf = _sign_leaf(signer, server_name, now)
        signer = _make_ca(now)
    else:
        others.remove(signer.certificate)
    if leaf is None or leaf.due(now) or _may_leave(leaf, signer, published, now):
        leaf = _sign_leaf(signer, server_name, now)
    if _signed(leaf, signer.certificate) and signer.age(now) >= 2 * OVERLAP:
        others = []
    after = [signer.certificate, *others]
    if after == before and leaf is kept:
        return found
    return {
        CA: b"".join(map(_pem, after)),
        CA_KEY: _key_pem(signer.key),
        LEAF: _pem(leaf.certificate),
        LEAF_KEY: _key_pem(leaf.key),
    }


def expires_at(leaf: bytes) -> dt.datetime:
    """Return until when a leaf is valid."""
    return x509.load_pem_x509_certificate(leaf).not_valid_after_utc


def _may_leave(leaf: _Pair, signer: _Pair, published: Collection[bytes], now: dt.datetime) -> bool:
    """Whether a leaf of an older CA can be replaced by one that the new CA has signed."""
    return (
        not _signed(leaf, signer.certificate)
        and signer.age(now) >= OVERLAP
        and all(signer.certificate in _bundle(bundle) for bundle in published)
    )


# --- reading


def _bundle(pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        return []


def _pair(certificate: x509.Certificate, key_pem: bytes) -> _Pair | None:
    """Put certificate and key together if they belong together."""
    try:
        key = serialization.load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        return None
    if not isinstance(key, _Key) or key.public_key() != certificate.public_key():
        return None
    return _Pair(certificate, key)


def _leaf(
    found: Mapping[str, bytes], authorities: Collection[x509.Certificate], server_name: str
) -> _Pair | None:
    """Read the leaf if EPPs could accept it."""
    chain = _bundle(found.get(LEAF, b""))
    leaf = _pair(chain[0], found.get(LEAF_KEY, b"")) if chain else None
    if leaf is None or not any(_signed(leaf, ca) for ca in authorities):
        return None
    try:
        names = leaf.certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return None
    return leaf if server_name in names.value.get_values_for_type(x509.DNSName) else None


def _signed(leaf: _Pair, authority: x509.Certificate) -> bool:
    try:
        leaf.certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


# --- making


def _make_ca(now: dt.datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    # Each CA has a name of its own: a bundle with two of one name would be ambiguous.
    name = _name(f"forebay control CA {now:%Y-%m-%d %H:%M:%S}")
    builder = _builder(name, name, key, now, now + CA_LASTS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(ca=True), critical=True)
    return _Pair(builder.sign(key, hashes.SHA256()), key)


def _sign_leaf(ca: _Pair, server_name: str, now: dt.datetime) -> _Pair:
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + LEAF_LASTS, ca.certificate.not_valid_after_utc)
    builder = _builder(_name("forebay operator"), ca.certificate.subject, key, now, until)
    for extension, critical in (
        (x509.BasicConstraints(ca=False, path_length=None), True),
        (_usage(ca=False), True),
        (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False),
        (x509.SubjectAlternativeName([x509.DNSName(server_name)]), False),
        (_authority_key(ca), False),
    ):
        builder = builder.add_extension(extension, critical=critical)
    return _Pair(builder.sign(ca.key, hashes.SHA256()), key)


def _authority_key(ca: _Pair) -> x509.AuthorityKeyIdentifier:
    """Name the CA's key as its certificate does: it may have been brought, not made here."""
    try:
        found = ca.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)
    except x509.ExtensionNotFound:
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(found.value)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: _Key, now: dt.datetime, until: dt.datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(until)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )


def _usage(*, ca: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not ca,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=ca,
        crl_sign=ca,
        encipher_only=False,
        decipher_only=False,
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _pem(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _key_pem(key: _Key) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
