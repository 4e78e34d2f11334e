"""Certificates for the servers of one test, by an authority that nobody else trusts.

All files are PEM, in a folder of the test's own, and worth nothing when it ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import trustme
from cryptography.hazmat.primitives import serialization

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Certificate:
    """A server's certificate with its key, and the two in one file as Kafka wants them."""

    certificate: Path
    key: Path
    both: Path


class Authority:
    """Issues certificates into a folder.

    Attributes
    ----------
    file : Path
        What a client must trust.
    """

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._issuer = trustme.CA()
        self.file = directory / "ca.pem"
        self._issuer.cert_pem.write_to_path(str(self.file))

    def issue(self, name: str, *hosts: str, expired: bool = False) -> Certificate:
        """Issue a certificate for some hosts, this machine if none is named, or one that ended yesterday."""
        now = datetime.now(UTC)
        issued = self._issuer.issue_cert(
            *(hosts or (HOST, "localhost")),
            not_before=now - timedelta(days=2),
            not_after=now - timedelta(days=1) if expired else now + timedelta(days=1),
        )
        made = Certificate(*(self._directory / f"{name}{end}" for end in ("-cert.pem", "-key.pem", ".pem")))
        chain = b"".join(blob.bytes() for blob in issued.cert_chain_pems)
        # Java reads PKCS#8 only.
        key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        made.certificate.write_bytes(chain)
        made.key.write_bytes(key)
        made.both.write_bytes(key + chain)
        return made
