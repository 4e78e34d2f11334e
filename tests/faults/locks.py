"""Servers behind locks: Apache Kafka over SASL and TLS, Redis over TLS with one user who may do little.

Both have a plain door too, for the test's own judge. A service that is let in by the locked door has used its
certificate, its user and its password; what that user may do is all that the service can.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import redis
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.protocol.admin import CreateAclsRequest

from stream_app.embedded import run_server
from stream_app.embedded.servers import free_port, redis_program
from tests.backends import ROOT, Names, ServiceMissing, apache_kafka
from tests.faults.certificates import HOST, Authority, Certificate

#: They hold what an URL, a shell, a JAAS file and a TOML string would each trip over, where they may.
KAFKA_SECRET: Final = "kf-Secr3t-4-Kafka.9@x%41"
REDIS_SECRET: Final = "rd-Secr3t/4:Redis?#9@x%41&=+"
USER: Final = "stream-app"

#: Kafka's numbers of what an ACL speaks about and allows.
TOPIC, GROUP = 2, 3
READ, WRITE, CREATE, DESCRIBE, DESCRIBE_CONFIGS = 3, 4, 5, 8, 10
_LITERAL, _ALLOW = 3, 3
_OPERATIONS: Final = {"Read": READ, "Write": WRITE, "Create": CREATE, "DescribeConfigs": DESCRIBE_CONFIGS}


@dataclass(frozen=True, slots=True)
class LockedKafka:
    """A broker whose locked doors have different certificates; `plain` is the judge's, who may do all."""

    plain: str
    locked: str
    expired: str
    elsewhere: str
    mutual: str
    authority: Authority

    def settings(self, address: str = "", **changes: object) -> dict[str, object]:
        """How a service is let in, as `Stage` takes settings."""
        return {
            "kafka__bootstrap_servers": address or self.locked,
            "kafka__security_protocol": "SASL_SSL",
            "kafka__sasl_mechanism": "SCRAM-SHA-512",
            "kafka__sasl_username": USER,
            "kafka__sasl_password": KAFKA_SECRET,
            "kafka__ssl_ca_file": self.authority.file,
            **changes,
        }

    def allow(self, *rules: tuple[int, str, Iterable[int]]) -> None:
        """Allow the service's user operations on resources: (kind, name, operations)."""
        asyncio.run(_allow(self.plain, rules))


def needed(names: Names) -> list[tuple[int, str, list[int]]]:
    """What the README's kafka-acls lines allow, all commands taken together, for these names."""
    ours = {
        "--topic events": (TOPIC, names.events),
        "--topic segment-entered": (TOPIC, names.entered),
        "--topic segment-exited": (TOPIC, names.exited),
        "--topic events-dead-letter": (TOPIC, names.dead_letter),
        "--group stream-app": (GROUP, names.group),
    }
    found = []
    for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("$ $acl "):
            operations = [_OPERATIONS[name] for name in re.findall(r"--operation (\w+)", line)]
            resources = re.findall(r"--(?:topic|group) \S+", line)
            found += [(*ours[resource], operations) for resource in resources]
    return found


@contextmanager
def locked_kafka(directory: Path) -> Iterator[LockedKafka]:
    """Run Apache Kafka with one open and three locked listeners, and an authorizer."""
    authority = Authority(directory)
    certificates = {
        "locked": authority.issue("kafka"),
        "expired": authority.issue("kafka-expired", expired=True),
        "elsewhere": authority.issue("kafka-elsewhere", "kafka.example"),
        "mutual": authority.issue("kafka-mutual"),
    }
    plain, controller = free_port(), free_port()
    doors = {name: free_port() for name in certificates}
    listeners = [f"PLAINTEXT://{HOST}:{plain}", *(f"{n.upper()}://{HOST}:{p}" for n, p in doors.items())]
    protocols = ["PLAINTEXT:PLAINTEXT", "CONTROLLER:PLAINTEXT"]
    protocols += [f"{name.upper()}:{'SSL' if name == 'mutual' else 'SASL_SSL'}" for name in doors]
    settings = {
        "listeners": ",".join([*listeners, f"CONTROLLER://{HOST}:{controller}"]),
        "advertised.listeners": ",".join(listeners),
        "controller.quorum.voters": f"1@{HOST}:{controller}",
        "listener.security.protocol.map": ",".join(protocols),
        "sasl.enabled.mechanisms": "SCRAM-SHA-512,PLAIN",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:ANONYMOUS",
        # The door that wants a certificate instead of a password takes each that the authority has issued.
        "listener.name.mutual.ssl.client.auth": "required",
        "listener.name.mutual.ssl.truststore.type": "PEM",
        "listener.name.mutual.ssl.truststore.location": str(authority.file),
        "listener.name.mutual.ssl.principal.mapping.rules": f"RULE:^.*$/{USER}/",
    }
    login = "org.apache.kafka.common.security"
    for name, certificate in certificates.items():
        own = f"listener.name.{name}"
        settings |= {
            f"{own}.ssl.keystore.type": "PEM",
            f"{own}.ssl.keystore.location": str(certificate.both),
            f"{own}.scram-sha-512.sasl.jaas.config": f"{login}.scram.ScramLoginModule required;",
            f"{own}.plain.sasl.jaas.config": (
                f'{login}.plain.PlainLoginModule required user_{USER}="{KAFKA_SECRET}";'
            ),
        }
    formatting = ("--add-scram", f"SCRAM-SHA-512=[name={USER},password={KAFKA_SECRET}]")
    with run_server(apache_kafka(settings, formatting=formatting), plain) as server:
        at = {name: f"{HOST}:{port}" for name, port in doors.items()}
        yield LockedKafka(
            server.address, at["locked"], at["expired"], at["elsewhere"], at["mutual"], authority
        )


async def _allow(bootstrap: str, rules: Sequence[tuple[int, str, Iterable[int]]]) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=bootstrap)
    await admin.start()
    try:
        for kind, name, operations in rules:
            for operation in operations:
                request = CreateAclsRequest(kind, name, _LITERAL, f"User:{USER}", "*", operation, _ALLOW)
                answer = await admin._send_request(request, admin._client.cluster.controller.nodeId)
                assert answer.creation_responses[0][0] == 0, answer
    finally:
        await admin.close()


@dataclass(frozen=True, slots=True)
class LockedRedis:
    """A store with a door over TLS; `plain` is the judge's, who may do all."""

    plain: str
    host_and_port: str
    authority: Authority

    def settings(self, **changes: object) -> dict[str, object]:
        """How a service is let in, as `Stage` takes settings."""
        return {
            "redis__url": f"rediss://{USER}@{self.host_and_port}/0",
            "redis__password": REDIS_SECRET,
            "redis__ssl_ca_file": self.authority.file,
            **changes,
        }

    def admit(self, rules: str) -> None:
        """Give the service's user these rights and no others."""
        with redis.Redis.from_url(self.plain) as client:
            client.execute_command("ACL", "SETUSER", USER, "reset", "on", f">{REDIS_SECRET}", *rules.split())


@contextmanager
def locked_redis(authority: Authority, certificate: Certificate) -> Iterator[LockedRedis]:
    """Run redis-server with a plain port and one over TLS."""
    executable = shutil.which("redis-server")
    if executable is None:
        raise ServiceMissing("no redis-server on the PATH, and the embedded Valkey is built without TLS")
    tls_port = free_port()
    arguments = {
        "tls-port": tls_port,
        "tls-cert-file": certificate.certificate,
        "tls-key-file": certificate.key,
        "tls-ca-cert-file": authority.file,
        "tls-auth-clients": "no",
    }
    words = [word for name, value in arguments.items() for word in (f"--{name}", str(value))]
    with run_server(redis_program("Redis", executable, words)) as server:
        yield LockedRedis(f"redis://{server.address}/0", f"{HOST}:{tls_port}", authority)


def documented_rules_in_a_cluster() -> str:
    """The rights that the README gives the service's user in a Redis Cluster."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (more,) = re.findall(r"with `redis\.cluster` also\s+`([^`]+)`", text)
    return f"{documented_rules()[USER]} {more}"


def documented_rules() -> Mapping[str, str]:
    """The rights in the README's ACL lines, by user: what stands there is what is tested."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    found = {}
    for line in lines:
        if line.startswith("ACL SETUSER "):
            user, _on, _password, rules = line.removeprefix("ACL SETUSER ").split(" ", 3)
            found[user] = rules
    return found
