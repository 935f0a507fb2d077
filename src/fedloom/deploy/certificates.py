"""The keys of a federation: its own CA, the server's certificate, and a key pair for every node.

CA and server hold ECDSA keys on P-384 with SHA-384. A node's key pair is ECDSA on P-384 too, in OpenSSH's format: what
Flower's node authentication reads (flwr 1.41: `--auth-supernode-private-key`, `flwr supernode register`).
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedloom.errors import ConfigError

CA_DAYS = 3650
"""Days that a CA is valid for."""
NODE_KEY_DAYS = 825
"""Days after which the doctor advises a new key for a node; Flower itself knows no end of a key."""
_UNTIL = "fedloom:until="
_SKEW = timedelta(hours=1)
"""Certificates begin this much before they are made, for clocks that are behind."""


def new_key() -> ec.EllipticCurvePrivateKey:
    """A fresh ECDSA key on P-384."""
    return ec.generate_private_key(ec.SECP384R1())


def new_ca(key: ec.EllipticCurvePrivateKey, name: str) -> x509.Certificate:
    """A CA that may sign servers, and no further CA."""
    usage = _usage(sign=False, certify=True)
    builder = _builder(name, name, key.public_key(), CA_DAYS)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(usage, critical=True)
    return builder.sign(key, hashes.SHA384())


def new_server(
    key: ec.EllipticCurvePrivateKey,
    hosts: Sequence[str],
    ca: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    days: int,
) -> x509.Certificate:
    """The server's certificate, for these host names and IP addresses (SANs)."""
    names = [san(host) for host in dict.fromkeys(hosts)]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    builder = _builder(hosts[0], _common_name(ca.subject), key.public_key(), days)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(sign=True, certify=False), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
    builder = builder.add_extension(issuer, critical=False)
    return builder.sign(ca_key, hashes.SHA384())


def san(host: str) -> x509.GeneralName:
    """A host name or IP address as it stands in a certificate."""
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """The certificate as PEM."""
    return certificate.public_bytes(Encoding.PEM)


def key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    """The private key as PEM (PKCS 8), not encrypted: the file's mode 0600 protects it."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def node_key_pair(key: ec.EllipticCurvePrivateKey) -> tuple[bytes, bytes]:
    """(private key, public key) of a node, in OpenSSH's format. The public key's comment says until when to use it."""
    private = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    until = datetime.now(UTC).date() + timedelta(days=NODE_KEY_DAYS)
    return private, public_line(key.public_key()) + f" {_UNTIL}{until:%Y-%m-%d}\n".encode()


def public_line(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key in OpenSSH's format, without a comment."""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)


def fingerprint(line: bytes) -> str:
    """The fingerprint of a public key in OpenSSH's format, as `ssh-keygen -l` prints it."""
    digest = hashlib.sha256(base64.b64decode(line.split()[1])).digest()
    return f"SHA256:{base64.b64encode(digest).decode().rstrip('=')}"


def use_until(line: bytes) -> date | None:
    """Until when a node's key is to be used, by the comment of its public key; None where it says nothing."""
    found = re.search(rf"{_UNTIL}(\d{{4}}-\d\d-\d\d)", line.decode(errors="replace"))
    try:
        return date.fromisoformat(found[1]) if found else None
    except ValueError:
        return None


def read_certificate(path: Path) -> x509.Certificate:
    """The first certificate of a file. Raises ConfigError where it holds none."""
    return read_certificates(path)[0]


def read_certificates(path: Path) -> list[x509.Certificate]:
    """All certificates of a file: ca.pem holds two while a new CA takes the old one's place. Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificates(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} holds no certificate that can be read: {error}") from None


def read_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """A private key in PEM or OpenSSH's format. Raises ConfigError where the file holds no such ECDSA key."""
    try:
        content = path.read_bytes()
        load = load_ssh_private_key if b"OPENSSH" in content[:64] else load_pem_private_key
        key = load(content, None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} holds no private key that can be read: {error}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path} holds another kind of key; expected ECDSA (ssh-keygen -t ecdsa -b 384)")
    return key


def read_public_key(path: Path) -> bytes:
    """The text of a node's public key. Raises ConfigError where the file holds no ECDSA key in OpenSSH's format."""
    try:
        content = path.read_bytes()
        key = load_ssh_public_key(content)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"{path} holds no public key that can be read: {error}; expected ECDSA, OpenSSH") from None
    if not isinstance(key, ec.EllipticCurvePublicKey):
        raise ConfigError(f"{path} holds another kind of key; expected ECDSA (ssh-keygen -t ecdsa -b 384)")
    return content


def is_signed_by(certificate: x509.Certificate, ca: x509.Certificate) -> bool:
    """Whether this CA signed the certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def hosts_of(certificate: x509.Certificate) -> list[str]:
    """The host names and IP addresses that a certificate is for."""
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return []
    return [str(name.value) for name in names if isinstance(name, x509.DNSName | x509.IPAddress)]


def _common_name(name: x509.Name) -> str:
    return str(name.get_attributes_for_oid(NameOID.COMMON_NAME)[0].value)


def _builder(subject: str, issuer: str, public: ec.EllipticCurvePublicKey, days: int) -> x509.CertificateBuilder:
    """What all certificates have: names, a random serial number, dates, the key's own identifier."""
    now = datetime.now(UTC)
    builder = x509.CertificateBuilder(
        subject_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject[:64])]),
        issuer_name=x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer[:64])]),
        public_key=public,
        serial_number=x509.random_serial_number(),
        not_valid_before=now - _SKEW,
        not_valid_after=now + timedelta(days=days),
    )
    return builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)


def _usage(*, sign: bool, certify: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=certify,
        crl_sign=certify,
        encipher_only=False,
        decipher_only=False,
    )
