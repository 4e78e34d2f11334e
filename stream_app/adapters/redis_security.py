"""Why Redis does not let this service in, in one sentence.

Decides which failures no waiting will cure: a certificate, a password, a right that is missing. What a client
needs to be let in stands in `redis.connection_url`. Must not show a secret: what is told are the words of
Redis and OpenSSL, which hold none.
"""

from __future__ import annotations

import re
import ssl
from typing import Final

from redis.exceptions import AuthenticationError, AuthorizationError, NoPermissionError, RedisError

from stream_app.errors import StartRefused

__all__ = ["not_admitted", "refusal", "words_of"]

#: How Redis, and Redis 7.0, say it of a command inside a script; the error's code is not that of a right.
_DENIED_IN_SCRIPT: Final = ("ACL failure in script", "The user executing the script can't")


def words_of(failure: BaseException) -> str:
    """Return what Redis and its client say of a failure, in one line, without the keys that they name.

    Examples
    --------
    >>> words_of(RedisError("No permissions to access the 'sa:{0}:profile:ann' key."))
    "RedisError: No permissions to access the 'sa:...' key"
    >>> words_of(RedisError("Command # 1 (UNLINK sa:{0}:profile:ann) of pipeline caused error: gone"))
    'RedisError: A command of a pipeline caused error: gone'
    """
    said = " ".join(str(failure).split()).rstrip(".")
    said = re.sub(r"Command # \d+ \(.*\) of pipeline", "A command of a pipeline", said)
    # A user may stand in the name of a key.
    return f"{type(failure).__name__}: " + re.sub(r"'sa:.*'", "'sa:...'", said)


def not_admitted(failure: BaseException, where: str) -> StartRefused | None:
    """Say that Redis does not know this user, or does not let him do this, if that is what `failure` is.

    Parameters
    ----------
    failure
        As redis-py raised it.
    where
        The address without credentials, or what was asked.

    Examples
    --------
    >>> print(not_admitted(NoPermissionError("No permissions to run the 'info' command"), "Redis, INFO"))
    ... # doctest: +ELLIPSIS
    Redis, INFO: expected a user who may use sa:* and the commands of this service, got NoPermissionError...
    >>> not_admitted(ConnectionError("refused"), "Redis") is None
    True
    >>> denied = RedisError("ACL failure in script: User app has no permissions to access the 'sa:{0}:x' key")
    >>> print(not_admitted(denied, "Redis, commit"))  # doctest: +ELLIPSIS
    Redis, commit: ... User app has no permissions to access the 'sa:...' key. Operator action: Give ...
    """
    got = words_of(failure)
    if isinstance(failure, NoPermissionError | AuthorizationError) or (
        isinstance(failure, RedisError) and any(text in got for text in _DENIED_IN_SCRIPT)
    ):
        return StartRefused(
            "a user who may use sa:* and the commands of this service", got, where,
            "Give the user behind redis.url the rights that the README lists (Locked doors).",
        )  # fmt: skip
    if isinstance(failure, AuthenticationError):
        return StartRefused(
            "to be let in", got, where,
            "Check the user and password of redis.url, or redis.password or its file.",
        )  # fmt: skip
    return None


def refusal(failure: BaseException, where: str) -> StartRefused | None:
    """Say why nothing can be asked of Redis at all, if waiting will not help; see `not_admitted`."""
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, ssl.SSLError):
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ssl.SSLCertVerificationError):
        return StartRefused(
            "a certificate that can be trusted", cause.verify_message.rstrip("."), where,
            "Renew the server's certificate, connect by a name that stands in it, or name its authority in "
            "redis.ssl_ca_file.",
        )  # fmt: skip
    if cause is not None:
        return StartRefused(
            "a TLS connection", cause.reason or str(cause), where,
            "Check that the port of redis.url speaks TLS, and redis.ssl_cert_file if it wants a client's "
            "certificate.",
        )  # fmt: skip
    return not_admitted(failure, where)
