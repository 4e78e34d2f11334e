"""How this service is let in by Kafka: what every client is given for it, and why one was not let in.

Decides the form that `[kafka]` takes for aiokafka, so that no client is made without it, and which failures
no waiting will cure. aiokafka keeps the reason of a failed connection to itself ("unable to bootstrap"), so
`refusal` asks for it once more. Must not show a secret: what is told is the broker's or OpenSSL's words.
"""

from __future__ import annotations

import functools
import ssl
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, Final

from aiokafka.conn import collect_hosts, create_conn
from aiokafka.errors import (
    AuthenticationFailedError,
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    IllegalSaslStateError,
    KafkaError,
    SaslAuthenticationFailed,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
    UnsupportedSaslMechanismError,
)

from stream_app.errors import StartRefused, StoreUnavailable, StreamAppError
from stream_app.settings import KafkaSettings, tls_context

__all__ = ["NOT_ALLOWED", "PLAINTEXT", "Security", "not_allowed", "refusal", "security_of", "told"]

#: What an aiokafka client takes beside the addresses; see `security_of`.
Security = Mapping[str, Any]
PLAINTEXT: Final[Security] = MappingProxyType({})
#: The broker knows who asks, and says no.
NOT_ALLOWED: Final = (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)
_KNOCK_TIMEOUT_S: Final = 3.0


@functools.cache
def security_of(kafka: KafkaSettings) -> Security:
    """Return what every aiokafka client is given as keywords; the TLS context is built once.

    Examples
    --------
    >>> dict(security_of(KafkaSettings()))
    {}
    """
    options: dict[str, Any] = {}
    if kafka.security_protocol != "PLAINTEXT":
        options["security_protocol"] = kafka.security_protocol
    if kafka.uses_tls:
        options["ssl_context"] = tls_context(kafka)
    if kafka.uses_sasl:
        options["sasl_mechanism"] = kafka.sasl_mechanism
        options["sasl_plain_username"] = kafka.sasl_username
        options["sasl_plain_password"] = kafka.sasl_password
    return MappingProxyType(options)


async def refusal(
    bootstrap_servers: str, security: Security, others: Iterable[str] = ()
) -> StartRefused | None:
    """Knock at each address once more, and say why this service is not let in, if that is why.

    Parameters
    ----------
    bootstrap_servers
        "host:port", several separated by commas.
    security
        As made by `security_of`.
    others
        More addresses, as the brokers advertise them.

    Returns
    -------
    StartRefused or None
        None if nobody says no: waiting may help then.
    """
    for host, port, _ in collect_hosts(",".join([bootstrap_servers, *others]), randomize=False):
        try:
            connection = await create_conn(
                host, port, request_timeout_ms=round(_KNOCK_TIMEOUT_S * 1000), **security
            )
        except (OSError, KafkaError, TimeoutError) as exc:
            if (refused := _explained(exc, f"Kafka at {host}:{port}", security)) is not None:
                return refused
        else:
            connection.close()
    return None


def _explained(failure: BaseException, where: str, security: Security) -> StartRefused | None:
    if isinstance(failure.__cause__, ssl.SSLError):
        failure = failure.__cause__  # that a client's certificate is wanted is told after the handshake
    if isinstance(failure, ssl.SSLCertVerificationError):
        return StartRefused(
            "a certificate that can be trusted", failure.verify_message.rstrip("."), where,
            "Renew the broker's certificate, connect by a name that stands in it, or name its authority in "
            "kafka.ssl_ca_file.",
        )  # fmt: skip
    if isinstance(failure, ssl.SSLError):
        return StartRefused(
            "a TLS connection", _one_line(failure.reason or failure), where,
            "Check that kafka.security_protocol is what this listener speaks, and kafka.ssl_cert_file if it "
            "wants a client's certificate.",
        )  # fmt: skip
    if isinstance(failure, SaslAuthenticationFailed | AuthenticationFailedError):
        return StartRefused(
            "to be let in", _one_line(failure), where,
            "Check kafka.sasl_username, kafka.sasl_password (or its file) and kafka.sasl_mechanism.",
        )  # fmt: skip
    if isinstance(failure, UnsupportedSaslMechanismError | IllegalSaslStateError):
        return StartRefused(
            f"a listener for {security['security_protocol']} with {security['sasl_mechanism']}",
            type(failure).__name__, where,
            "Check kafka.security_protocol and kafka.sasl_mechanism.",
        )  # fmt: skip
    return None


def told(error: BaseException, where: str) -> StreamAppError:
    """Return a failure of aiokafka as ours: a right that is missing stops the worker, all else may pass.

    Examples
    --------
    >>> told(TopicAuthorizationFailedError("events"), "Kafka, publish").__class__.__name__
    'StartRefused'
    >>> told(TimeoutError(), "Kafka, publish").__class__.__name__
    'StoreUnavailable'
    """
    if isinstance(error, NOT_ALLOWED):
        return not_allowed(error, where)
    return StoreUnavailable(where, f"{type(error).__name__}: {error}")


def not_allowed(error: KafkaError, where: str) -> StartRefused:
    """Say that the broker knows this user and refuses what was asked; `error` is one of `NOT_ALLOWED`."""
    return StartRefused(
        "a user who may do this",
        _one_line(error),
        where,
        "Give the user of kafka.sasl_username what it lacks: read on the events topic and the group, write "
        "on the output topics, describe configs on all four (README, Locked doors).",
    )


def _one_line(failure: object) -> str:
    text = " ".join(str(failure).split()).rstrip(".")
    return text or type(failure).__name__
