"""The worker on a Redis Cluster: what it promises there, and what weakens when a master is lost.

Replication is asynchronous: a master that dies takes commits along that it has acknowledged. What is lost is
found by the next commit (its number does not follow) or by the next claim, and the log is folded again from
the watermark that the new master has.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
from aiokafka import AIOKafkaProducer
from redis.crc import key_slot

from stream_app.adapters.checks import check_redis
from stream_app.adapters.model_store import ModelStore
from stream_app.adapters.profile_store import Commit, ProfileStore, keys, script_text
from stream_app.adapters.redis_client import connect
from stream_app.core.decay import NEVER_MS
from stream_app.core.partitioner import partition_of
from stream_app.embedded import Server
from stream_app.embedded.servers import HOST, free_port
from stream_app.errors import Fenced, StartRefused, StateLost, StoreUnavailable
from stream_app.lookup import AsyncLookup, Lookup, UserView
from tests.backends import ROOT, Kind, Names, ServiceMissing, read_to_end, redis_url_of
from tests.conftest import missing
from tests.contract.test_profile_store import IDENTITY, T0, Cut, claim, member
from tests.e2e.proof import Case, Proof, prove
from tests.faults.cluster import RedisCluster, ask, follows, is_master, redis_cluster
from tests.faults.faulty import Switch
from tests.faults.locks import documented_rules
from tests.faults.rows import Row, seed
from tests.faults.stage import FaultStage, fault_log
from tests.faults.unsafe import TOLD
from tests.integration.stage import event_clock_case, kill_server, probe, wait_until
from tests.processes import Program, Programs

pytestmark = pytest.mark.faults

PARTITIONS = 4  # at least one on each master; two of them, and sa:meta, on the second
LOST = 1
EVENTS = 6_000
FEED_S = 12.0
FEED_PARTS = 120
PROMOTION_DEADLINE_S = 30.0
HEALED = (
    "the log heals it: nothing lost, nothing twice, in order; repeats say replayed but for what was not yet "
    "acknowledged"
)
UNPROTECTED = "errors taken for success, mismatch check off"


@pytest.fixture
def with_replicas(redis_kind: Kind) -> Iterator[RedisCluster]:
    """Three masters with a replica each, of this test's own."""
    with contextlib.ExitStack() as stack:
        try:
            made = stack.enter_context(redis_cluster(redis_kind, replicas=True))
        except ServiceMissing as exc:
            missing(str(exc))
        yield made


@pytest.fixture
def on_cluster(
    kafka_bootstrap: str, programs: Programs, tmp_path: Path
) -> Callable[[RedisCluster], FaultStage]:
    """Build a stage on a Cluster."""

    def build(cluster: RedisCluster, **settings: Any) -> FaultStage:
        case = replace(event_clock_case(kafka_bootstrap, cluster.url, Names.unique()), cluster=True)
        return FaultStage.build(case, programs, tmp_path, partitions=PARTITIONS, **settings)

    return build


@contextlib.contextmanager
def fed(stage: FaultStage, *, count: int = EVENTS, seconds: float = FEED_S) -> Iterator[threading.Event]:
    """Append the log of a run bit by bit while the body runs; the event is set when all is appended."""
    records = list(fault_log(seed(), count))
    done = threading.Event()
    stop = threading.Event()

    async def feed() -> None:
        size = -(-len(records) // FEED_PARTS)
        async with AIOKafkaProducer(bootstrap_servers=stage.case.kafka, acks="all") as producer:
            for first in range(0, len(records), size):
                part = records[first : first + size]
                sent = [await producer.send(stage.case.names.events, value, key=key) for key, value in part]
                await asyncio.gather(*sent)
                if await asyncio.to_thread(stop.wait, seconds / FEED_PARTS):
                    return
        done.set()

    thread = threading.Thread(target=lambda: asyncio.run(feed()))
    thread.start()
    try:
        yield done
    finally:
        stop.set()
        thread.join()


def watermark_at(server: Server, partition: int) -> int:
    """The watermark that one node has of a partition; -1 if it is not the master of it or does not answer."""
    try:
        return int(ask(server, "HGET", keys(partition).wm, "watermark") or 0)
    except (redis.RedisError, OSError):
        return -1


def watermark_below(server: Server, partition: int) -> int:
    """The watermark that a replica has."""
    with redis.Redis(host="127.0.0.1", port=server.port) as client:
        raw: Any = client
        with raw.client() as one:
            one.execute_command("READONLY")
            return int(one.hget(keys(partition).wm, "watermark") or 0)


def repeats_not_marked(case: Case) -> int:
    """Count what was published again under its id without saying so."""
    said: Counter[str] = Counter()
    unmarked = 0
    for record in asyncio.run(read_to_end(case.kafka, case.names.entered, case.names.exited)):
        message = json.loads(record.value)
        said[message["id"]] += 1
        unmarked += said[message["id"]] > 1 and not message["replayed"]
    return unmarked


def folded_by(port: int) -> int:
    """Records that a worker has committed so far, those that it folded again included."""
    _, text = probe(port, "metrics")
    counted = ("stream_app_events_total ", "stream_app_dead_letters_total{")
    return sum(int(float(line.split()[-1])) for line in text.splitlines() if line.startswith(counted))


def claimed(worker: Program) -> list[tuple[int, int]]:
    """Partition and watermark of each claim in a worker's log."""
    return [
        (int(line.split("partition ")[1].split(":")[0]), int(line.split("watermark ")[1].split(",")[0]))
        for line in worker.log.splitlines()
        if ": claimed, epoch " in line
    ]


def started(stage: FaultStage, port: int, without: Sequence[Switch] = ()) -> Program:
    """Start a worker and wait until it has claimed all partitions."""
    worker = stage.start_faulty("worker", worker__http_port=port, without=without)
    worker.wait_until(lambda: len(dict(claimed(worker))) == PARTITIONS, 40, "claimed")
    return worker


def finished(stage: FaultStage, worker: Program, port: int, total: int) -> int:
    """Wait until all is folded and published, end the worker; return how many records it folded again."""
    worker.wait_until(lambda: stage.is_done(stage.log_ends()), 60, "all folded")
    again = folded_by(port) - total
    worker.terminate()
    assert worker.wait(30) == 0, worker.log
    return again


async def _members_of(case: Case, segment_id: str) -> set[str]:
    with Lookup(case.redis_url, cluster=True) as lookup:
        members = {one.user_id for one in lookup.members(segment_id)}
    async with AsyncLookup(case.redis_url, cluster=True) as lookup:
        assert {one.user_id async for one in lookup.members(segment_id)} == members
        assert await lookup.member_count(segment_id) == len(members)
    return members


# --- as on one server --------------------------------------------------------------------------------------


def test_a_cluster_of_three_masters_does_what_one_server_does(
    redis_masters: RedisCluster,
    on_cluster: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row("Redis Cluster, three masters, two workers", "nothing lost, nothing twice, in order")
    for master in redis_masters.masters:
        ask(master, "FLUSHALL")
        ask(master, "FUNCTION FLUSH")
        ask(master, "SCRIPT FLUSH")
    control = on_cluster(redis_masters)
    control.fill(2_000)
    control.lose_what_a_worker_publishes()
    row.control("outbox off, killed after a commit", prove(control.case))
    control.run("rebuild", "--yes")
    stage = on_cluster(redis_masters)
    stage.fill()
    other = stage.start("worker")
    stage.run("worker", "--until-end")
    other.terminate()
    assert other.wait(30) == 0, other.log
    row.judge(prove(stage.case))
    for master in redis_masters.masters:
        assert ask(master, "FCALL_RO", "sa_version", 0)
        assert any(key.endswith(b":wm") for key in ask(master, "KEYS", "*")), "a master without a partition"
    stage.run("doctor")
    assert '"id": "fans"' in stage.run("segments", "list", "--json")
    members = json.loads(stage.run("segments", "members", "any-colour", "--json"))["members"]
    user = members[0]["user_id"]
    assert json.loads(stage.run("show", user, "--json"))["user_id"] == user
    assert asyncio.run(_members_of(stage.case, "any-colour")) == {one["user_id"] for one in members}
    handed_over = repeats_not_marked(stage.case)
    stage.run("rebuild", "--yes")
    assert [ask(master, "DBSIZE") for master in redis_masters.masters] == [0, 0, 0]
    stage.run("worker", "--until-end")
    proof = row.judge(prove(stage.case))
    assert proof.replayed
    assert repeats_not_marked(stage.case) == handed_over


# --- a master is lost --------------------------------------------------------------------------------------


@pytest.mark.parametrize("run", range(3))
def test_a_master_is_killed_and_its_replica_takes_over(
    run: int,
    with_replicas: RedisCluster,
    on_cluster: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row("Redis Cluster, a master killed", "nothing lost, nothing twice, in order; held meanwhile")
    stage, port = on_cluster(with_replicas), free_port()
    master, replica = with_replicas.masters[LOST], with_replicas.replicas[LOST]
    worker = started(stage, port)
    with fed(stage) as all_is_sent:
        worker.wait_until(lambda: watermark_at(master, 1) > 200 + 50 * run, 30, "folding")
        outage = _lose(master, replica, worker)
        worker.wait_until(all_is_sent.is_set, 60, "all sent")
    again = finished(stage, worker, port, sum(stage.log_ends().values()))
    proof = row.judge(prove(stage.case))
    row.note(
        f"{outage}; {again} records folded again, {proof.repeats} messages repeated, "
        f"{repeats_not_marked(stage.case)} of them not marked replayed"
    )
    if run == 0:
        row.control(UNPROTECTED, unprotected(on_cluster, with_replicas, cut=False))


def test_acknowledged_commits_that_a_failover_loses_are_folded_again_from_the_log(
    with_replicas: RedisCluster,
    on_cluster: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "Redis Cluster, a master killed with commits that its replica has not got",
        HEALED,
    )
    stage, port = on_cluster(with_replicas), free_port()
    master, replica = with_replicas.masters[LOST], with_replicas.replicas[LOST]
    worker = started(stage, port)
    with fed(stage) as all_is_sent:
        worker.wait_until(lambda: watermark_at(master, 1) > 200, 30, "folding")
        cut_replication(master, replica)
        had = {p: watermark_below(replica, p) for p in (1, 2)}
        worker.wait_until(
            lambda: all(watermark_at(master, p) > had[p] + 200 for p in had), 30, "commits that will be lost"
        )
        lost = {p: watermark_at(master, p) - had[p] for p in had}
        assert {p: watermark_below(replica, p) for p in had} == had
        before = len(claimed(worker))
        outage = _lose(master, replica, worker)
        assert {p: at for p, at in reversed(claimed(worker)[before:]) if p in had} == had
        worker.wait_until(all_is_sent.is_set, 60, "all sent")
    again = finished(stage, worker, port, sum(stage.log_ends().values()))
    assert again >= sum(lost.values())
    proof = row.judge(prove(stage.case))
    assert proof.repeats
    unmarked = repeats_not_marked(stage.case)
    row.note(
        f"{outage}; {again} records folded again, {proof.repeats} messages repeated, {unmarked} of them not "
        "marked replayed"
    )
    row.control(UNPROTECTED, unprotected(on_cluster, with_replicas, cut=True))


def unprotected(on_cluster: Callable[..., FaultStage], cluster: RedisCluster, *, cut: bool) -> Proof:
    """Kill the successor of the master that was killed, under a worker that takes all that for nothing."""
    master, replica = cluster.replicas[LOST], cluster.start_again(LOST)
    wait_until(lambda: follows(replica), 30, "the killed master back")
    for server in (*cluster.masters[:LOST], master, *cluster.masters[LOST + 1 :]):
        ask(server, "FLUSHALL")
    stage = on_cluster(cluster, model__enabled=False)
    worker = started(stage, free_port(), ["errors", "mismatch"])
    with fed(stage) as all_is_sent:
        worker.wait_until(lambda: watermark_at(master, 1) > 200, 30, "folding")
        if cut:
            cut_replication(master, replica)
            had = watermark_at(master, 1)
            worker.wait_until(lambda: watermark_at(master, 1) > had + 200, 30, "commits that will be lost")
        kill_server(master)
        wait_until(lambda: is_master(replica), PROMOTION_DEADLINE_S, "a promotion")
        assert all_is_sent.wait(60)
    assert TOLD in worker.log
    # Both may end with an error: what is left in Redis need not fit together.
    worker.terminate()
    worker.wait(30)
    stage.start("worker", "--until-end").wait(60)
    return prove(stage.case)


def cut_replication(master: Server, replica: Server) -> None:
    """Let a replica hear nothing more of what its master does; stopping its process would only delay it."""
    ask(master, "ACL SETUSER", "default", "-psync", "-sync")
    ask(master, "CLIENT KILL", "TYPE", "replica")
    wait_until(lambda: ask(replica, "ROLE")[3] != b"connected", 10, "replication cut")


def _lose(master: Server, replica: Server, worker: Program) -> str:
    """Kill a master; say how long it took until its replica was promoted, and until the worker went on."""
    kill_server(master)
    killed_s = time.monotonic()
    wait_until(lambda: is_master(replica), PROMOTION_DEADLINE_S, "a promotion")
    promoted_s = time.monotonic() - killed_s
    began = {p: watermark_at(replica, p) for p in (1, 2)}
    worker.wait_until(
        lambda: all(watermark_at(replica, p) > began[p] for p in began), PROMOTION_DEADLINE_S, "going on"
    )
    return f"promoted after {promoted_s:.1f} s, going on after {time.monotonic() - killed_s:.1f} s"


def test_a_master_that_is_back_follows_and_can_take_over_again(
    with_replicas: RedisCluster,
    on_cluster: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "Redis Cluster, the killed master back as a replica, then its successor killed",
        "nothing lost, nothing twice, in order; held meanwhile",
    )
    stage, port = on_cluster(with_replicas), free_port()
    master, replica = with_replicas.masters[LOST], with_replicas.replicas[LOST]
    worker = started(stage, port)
    with fed(stage, seconds=2 * FEED_S) as all_is_sent:
        worker.wait_until(lambda: watermark_at(master, 1) > 200, 30, "folding")
        first = _lose(master, replica, worker)
        back = with_replicas.start_again(LOST)
        wait_until(lambda: follows(back), 30, "the killed master back")
        second = _lose(replica, back, worker)
        worker.wait_until(all_is_sent.is_set, 60, "all sent")
    again = finished(stage, worker, port, sum(stage.log_ends().values()))
    proof = row.judge(prove(stage.case))
    row.note(f"{first}, then {second}; {again} records folded again, {proof.repeats} messages repeated")


def test_a_master_that_comes_back_empty_before_its_replica_takes_over_is_filled_from_the_log(
    with_replicas: RedisCluster,
    on_cluster: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "Redis Cluster, a master without persistence restarted at once, and its replica emptied by it",
        HEALED,
    )
    stage, port = on_cluster(with_replicas), free_port()
    master = with_replicas.masters[LOST]
    worker = started(stage, port)
    with fed(stage) as all_is_sent:
        worker.wait_until(lambda: watermark_at(master, 1) > 300, 30, "folding")
        kill_server(master)
        back = with_replicas.start_again(LOST)
        worker.wait_until(lambda: watermark_at(back, 1) > 0, 30, "folded into it")
        worker.wait_until(all_is_sent.is_set, 60, "all sent")
    again = finished(stage, worker, port, sum(stage.log_ends().values()))
    proof = row.judge(prove(stage.case))
    assert again > 300
    assert proof.replayed
    row.note(
        f"{again} records folded again, {proof.repeats} messages repeated, "
        f"{repeats_not_marked(stage.case)} of them not marked replayed"
    )


async def test_a_claim_that_a_failover_loses_is_found_by_its_owner_and_made_again(
    with_replicas: RedisCluster,
) -> None:
    """Until then the worker that it had fenced may go on: with the same log it comes to the same state."""
    master, replica = with_replicas.masters[LOST], with_replicas.replicas[LOST]
    old = ProfileStore(connect(with_replicas.url, cluster=True), "worker-a")
    new = ProfileStore(connect(with_replicas.url, cluster=True), "worker-b")
    try:
        await claim(old, 1)
        await old.commit(1, 1, 1, Commit(watermark=1))
        assert ask(master, "WAIT", 1, 5000) == 1
        cut_replication(master, replica)
        lost = (await claim(new, 1)).watermark
        await new.commit(1, lost.epoch, 2, Commit(watermark=2))
        with pytest.raises(Fenced):
            await old.commit(1, 1, 2, Commit(watermark=2))
        kill_server(master)
        wait_until(lambda: is_master(replica), PROMOTION_DEADLINE_S, "a promotion")
        wait_until(lambda: watermark_at(replica, 1) == 1, 10, "an answer of the new master")
        for store in (old, new):
            await _found(store)
        with pytest.raises(StateLost):
            await new.commit(1, lost.epoch, 3, Commit(watermark=3))
        again = (await claim(new, 1, last_epoch=lost.epoch)).watermark
        assert (again.commit, again.watermark) == (1, 1)
        assert again.epoch > lost.epoch
        with pytest.raises(Fenced):
            await old.commit(1, 1, 2, Commit(watermark=2))
        await new.commit(1, again.epoch, 2, Commit(watermark=2))
    finally:
        await old.close()
        await new.close()


async def _found(store: ProfileStore) -> None:
    """Ask until a client has the new master in its slot map, which a failure makes it ask for anew."""
    async with asyncio.timeout(PROMOTION_DEADLINE_S):
        while True:
            with contextlib.suppress(StoreUnavailable):
                await store.next_due_ms(1)
                return
            await asyncio.sleep(0.05)  # the node that it asked had not heard of the promotion yet


# --- slots move ---------------------------------------------------------------------------------------------


def test_a_worker_follows_a_master_that_hands_over_to_its_replica(
    with_replicas: RedisCluster,
    on_cluster: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row("Redis Cluster, a replica takes over by order", "nothing lost, nothing twice, in order")
    stage, port = on_cluster(with_replicas), free_port()
    master, replica = with_replicas.masters[LOST], with_replicas.replicas[LOST]
    worker = started(stage, port)
    with fed(stage) as all_is_sent:
        worker.wait_until(lambda: watermark_at(master, 1) > 200, 30, "folding")
        ask(replica, "CLUSTER FAILOVER")
        wait_until(lambda: is_master(replica), PROMOTION_DEADLINE_S, "a promotion")
        # The map of the worker is stale now; its old master tells it where to go.
        worker.wait_until(lambda: watermark_at(replica, 1) > 400, 30, "going on")
        wait_until(lambda: ask(master, "ROLE")[0] == b"slave", 10, "the old master a replica")
        ask(master, "CLUSTER FAILOVER")
        wait_until(lambda: is_master(master), PROMOTION_DEADLINE_S, "the old master back")
        worker.wait_until(all_is_sent.is_set, 60, "all sent")
    again = finished(stage, worker, port, sum(stage.log_ends().values()))
    proof = row.judge(prove(stage.case))
    row.note(
        f"{again} records folded again, {proof.repeats} messages repeated, {len(claimed(worker))} claims"
    )


def test_a_worker_follows_a_partition_that_moves_to_another_master(
    redis_masters: RedisCluster,
    on_cluster: Callable[..., FaultStage],
    fault_row: Callable[[str, str], Row],
) -> None:
    row = fault_row(
        "Redis Cluster, the slot of a partition moved to another master",
        "nothing lost, nothing twice, in order; held while the slot is in both",
    )
    for server in redis_masters.masters:
        ask(server, "FLUSHALL")
    stage, port = on_cluster(redis_masters), free_port()
    home = redis_masters.master_of(0)
    source, target = redis_masters.masters[home], redis_masters.masters[home - 1]
    worker = started(stage, port)
    with fed(stage) as all_is_sent:
        worker.wait_until(lambda: watermark_at(source, 0) > 200, 30, "folding")
        began_s = time.monotonic()
        with moved(redis_masters, 0, source, target):
            worker.wait_until(lambda: watermark_at(target, 0) > 400, 30, "going on there")
            took_s = time.monotonic() - began_s
            worker.wait_until(all_is_sent.is_set, 60, "all sent")
            again = finished(stage, worker, port, sum(stage.log_ends().values()))
            proof = row.judge(prove(stage.case))
    row.note(
        f"going on after {took_s:.1f} s; {again} records folded again, {proof.repeats} messages repeated"
    )


@contextlib.contextmanager
def moved(cluster: RedisCluster, partition: int, source: Server, target: Server) -> Iterator[None]:
    """Move a partition's slot to another master for as long as the body takes."""
    slot = key_slot(str(partition).encode())
    _move(cluster, slot, source, target)
    yield
    ask(target, "FLUSHALL")
    _move(cluster, slot, target, source)


def _move(cluster: RedisCluster, slot: int, source: Server, target: Server) -> None:
    ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", ask(source, "CLUSTER MYID").decode())
    ask(source, "CLUSTER SETSLOT", slot, "MIGRATING", ask(target, "CLUSTER MYID").decode())
    while names := ask(source, "CLUSTER GETKEYSINSLOT", slot, 10):
        ask(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5000, "KEYS", *names)
    for server in (target, source, *cluster.masters):
        ask(server, "CLUSTER SETSLOT", slot, "NODE", ask(target, "CLUSTER MYID").decode())


async def test_a_walk_over_all_keys_fails_where_slots_have_changed_hands(redis_masters: RedisCluster) -> None:
    source, target = redis_masters.masters[:2]
    for server in redis_masters.masters:
        ask(server, "FLUSHALL")
    store = ProfileStore(connect(redis_masters.url, cluster=True), "worker-a")
    try:
        await claim(store, 3)
        pages = [page async for page in store.scan_users(10)]
        assert pages == []
        slot = key_slot(b"3")
        ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", ask(source, "CLUSTER MYID").decode())
        with pytest.raises(StoreUnavailable, match="on its way"):
            pages = [page async for page in store.scan_users(10)]
    finally:
        ask(target, "CLUSTER SETSLOT", slot, "STABLE")
        await store.close()


async def test_a_slot_that_is_offered_by_a_node_unknown_so_far_is_an_outage_and_no_crash(
    redis_masters: RedisCluster,
) -> None:
    """The node of a redirection (ASK) that redis-py has not in its map."""
    source, target = redis_masters.masters[:2]
    for server in redis_masters.masters:
        ask(server, "FLUSHALL")
    client = connect(redis_masters.url, cluster=True)
    store = ProfileStore(client, "worker-a")
    slot = key_slot(b"3")
    try:
        await claim(store, 5)
        ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", ask(source, "CLUSTER MYID").decode())
        ask(source, "CLUSTER SETSLOT", slot, "MIGRATING", ask(target, "CLUSTER MYID").decode())
        raw: Any = client
        raw.nodes_manager.nodes_cache.pop(target.address)
        with pytest.raises(StoreUnavailable, match="not in the slot map"):
            await store.next_due_ms(3)
        assert await store.next_due_ms(3) is None
    finally:
        ask(source, "CLUSTER SETSLOT", slot, "STABLE")
        ask(target, "CLUSTER SETSLOT", slot, "STABLE")
        await store.close()


@pytest.mark.parametrize("told", [True, False], ids=["as it is", "control"])
async def test_no_step_is_half_made_while_its_slot_moves(redis_masters: RedisCluster, told: bool) -> None:
    """A script that deletes a key and writes it again is broken off: the key may be at the other master."""
    source, target = redis_masters.masters[:2]
    for server in redis_masters.masters:
        ask(server, "FLUSHALL")
    client = connect(redis_masters.url, cluster=True)
    store = ProfileStore(client, "worker-a")
    slot = key_slot(b"3")
    users = {"u1": member("u1", {"tea": T0})}
    step = Commit(users, outbox=[b"second"], watermark=2, scores={"u1": b"s"})
    wm = keys(3).wm
    try:
        await claim(store, 3)
        await store.commit(3, 1, 1, Commit(users, outbox=[b"first"], watermark=1, scores={"u1": b"s"}))
        ask(target, "CLUSTER SETSLOT", slot, "IMPORTING", ask(source, "CLUSTER MYID").decode())
        ask(source, "CLUSTER SETSLOT", slot, "MIGRATING", ask(target, "CLUSTER MYID").decode())
        if not told:
            store._commit = redis.asyncio.RedisCluster.register_script(client, script_text("commit.lua"))
        with pytest.raises(StoreUnavailable):
            await store.commit(3, 1, 2, step)
        outbox = [page async for page in store.outbox(3)]
        assert ask(source, "HMGET", wm, "commit", "watermark") == [b"1", b"1"]
        assert outbox == ([[b"first"]] if told else [])
        ask(source, "CLUSTER SETSLOT", slot, "STABLE")
        if told:
            assert await store.commit(3, 1, 2, step) == T0
    finally:
        ask(source, "CLUSTER SETSLOT", slot, "STABLE")
        ask(target, "CLUSTER SETSLOT", slot, "STABLE")
        await store.close()


# --- one command, once --------------------------------------------------------------------------------------


async def test_a_master_that_does_not_know_the_script_is_told_it(redis_masters: RedisCluster) -> None:
    for server in redis_masters.masters:
        ask(server, "FLUSHALL")
        ask(server, "SCRIPT FLUSH")
    store = ProfileStore(connect(redis_masters.url, cluster=True), "worker-a")
    try:
        for partition in range(PARTITIONS):
            await claim(store, partition)
            await store.commit(partition, 1, 1, Commit(watermark=1))
            ask(redis_masters.masters[redis_masters.master_of(partition)], "SCRIPT FLUSH")
            await store.commit(partition, 1, 2, Commit(watermark=2))
        found = await store.watermarks(range(PARTITIONS))
        assert {(wm.commit, wm.watermark) for wm in found.values() if wm} == {(2, 2)}
    finally:
        await store.close()


@contextlib.asynccontextmanager
async def behind_cut(redis_server: Callable[..., Server]) -> AsyncIterator[tuple[Cut, str]]:
    """A Cluster of one node that is reached through a proxy only."""
    port = free_port()
    server = redis_server(
        "--cluster-enabled", "yes", "--cluster-port", str(free_port()),
        "--cluster-announce-ip", HOST, "--cluster-announce-port", str(port),
    )  # fmt: skip
    ask(server, "CLUSTER ADDSLOTSRANGE", 0, 16383)
    wait_until(lambda: b"cluster_state:ok" in ask(server, "CLUSTER INFO"), 15, "a Cluster of one")
    cut = Cut(redis_url_of(server))
    async with await asyncio.start_server(cut, HOST, port):
        yield cut, f"redis://{HOST}:{port}/0"


@pytest.mark.parametrize("made", [True, False], ids=["after the write", "before the write"])
async def test_a_commit_whose_connection_is_cut_is_never_repeated_in_a_cluster(
    redis_server: Callable[..., Server], made: bool
) -> None:
    async with behind_cut(redis_server) as (cut, url):
        store = ProfileStore(connect(url, cluster=True), "worker-a")
        try:
            await claim(store)
            await store.commit(0, 1, 1, Commit(outbox=[b"first"]))
            cut.requests.clear()
            cut.before_reply, cut.before_request = made, not made
            with pytest.raises(StoreUnavailable, match="Redis, commit"):
                await store.commit(0, 1, 2, Commit(outbox=[b"second"], watermark=7))
            assert b"".join(cut.requests).count(b"EVAL") == 1
            assert (await claim(store)).watermark.commit == (2 if made else 1)
            assert b"".join(cut.requests).count(b"second") == 1
        finally:
            await store.close()


async def test_a_question_about_a_known_user_is_one_round_trip_in_a_cluster(
    redis_server: Callable[..., Server],
) -> None:
    async with behind_cut(redis_server) as (cut, url):
        store = ProfileStore(connect(url, cluster=True), "worker-a")
        lookup = AsyncLookup(url, cluster=True)
        waiting = Lookup(url, cluster=True)
        try:
            partition = partition_of(b"u1", IDENTITY.partitions)
            await claim(store, partition)
            await store.commit(partition, 1, 1, Commit({"u1": member("u1", {"tea": NEVER_MS})}))

            async def blocking(user_id: str) -> UserView | None:
                return await asyncio.to_thread(waiting.user, user_id)

            for asked in (lookup.user, blocking):
                assert await asked("nobody") is None  # opens the connection and reads sa:meta
                cut.requests.clear()
                found = await asked("u1")
                assert found is not None
                assert [one.segment_id for one in found.segments] == ["tea"]
                assert len(cut.requests) == 1
        finally:
            waiting.close()
            await lookup.close()
            await store.close()


async def test_lookups_find_the_new_master(with_replicas: RedisCluster) -> None:
    partition, user = next(
        (p, f"u{n}") for n in range(99) if with_replicas.master_of(p := partition_of(b"u%d" % n, 4)) == LOST
    )
    store = ProfileStore(connect(with_replicas.url, cluster=True), "worker-a")
    master, replica = with_replicas.masters[LOST], with_replicas.replicas[LOST]
    lookup = AsyncLookup(with_replicas.url, cluster=True)
    waiting = Lookup(with_replicas.url, cluster=True)
    try:
        await claim(store, partition)
        await store.commit(partition, 1, 1, Commit({user: member(user, {"tea": NEVER_MS})}))
        await lookup.user(user)
        waiting.user(user)
        assert ask(master, "WAIT", 1, 5000) == 1
        kill_server(master)
        with pytest.raises(StoreUnavailable):
            await lookup.user(user)
        with pytest.raises(StoreUnavailable):
            waiting.user(user)
        wait_until(lambda: is_master(replica), PROMOTION_DEADLINE_S, "a promotion")
        wait_until(lambda: _answers(waiting, user), 20, "an answer")
        assert waiting.is_member(user, "tea")
        assert await lookup.is_member(user, "tea")
        assert await ModelStore(connect(with_replicas.url, cluster=True), "reader").heads(range(4))
    finally:
        waiting.close()
        await lookup.close()
        await store.close()


def _answers(lookup: Lookup, user: str) -> bool:
    try:
        return lookup.user(user) is not None
    except StoreUnavailable:
        return False


# --- looked at before the start -----------------------------------------------------------------------------


async def test_every_node_is_looked_at_and_named(with_replicas: RedisCluster) -> None:
    ask(with_replicas.replicas[2], "CONFIG SET", "maxmemory-policy", "allkeys-lru")
    async with contextlib.aclosing(connect(with_replicas.url, cluster=True)) as client:
        found = await check_redis(client, "redis://somewhere")
    assert {one.state for one in found} == {"ok", "bad"}
    (bad,) = [one for one in found if one.state == "bad"]
    assert f"node {with_replicas.replicas[2].address}" in bad.name
    assert "allkeys-lru" in bad.got
    assert len(found) == 6


async def test_a_right_that_a_cluster_needs_and_is_missing_is_named(redis_masters: RedisCluster) -> None:
    url = f"redis://half:a-secret@{redis_masters.masters[0].address}/0"
    for rules, said in (("+info", r"'cluster\|?s?l?o?t?s?'"), ("+info +cluster|slots", "'command'")):
        ask(redis_masters.masters[0], "ACL SETUSER", "half", "reset", "on", ">a-secret", *rules.split())
        async with contextlib.aclosing(connect(url, cluster=True)) as client:
            with pytest.raises(StartRefused, match=said) as refused:
                await check_redis(client, "redis://***@a")
        assert "README" in refused.value.operator_action
        assert "a-secret" not in str(refused.value)


async def test_the_kind_of_redis_that_is_not_the_configured_one_is_refused_in_a_sentence(
    redis_masters: RedisCluster, fresh_redis: str
) -> None:
    async with contextlib.aclosing(connect(redis_masters.url)) as client:
        (bad,) = [one for one in await check_redis(client, "redis://a") if one.state == "bad"]
    assert bad.action == "Set redis.cluster to true."
    async with contextlib.aclosing(connect(fresh_redis, cluster=True)) as client:
        with pytest.raises(StartRefused, match="Cluster mode is not enabled"):
            await check_redis(client, "redis://a")


def test_the_rights_in_the_readme_are_enough_in_a_cluster(
    redis_masters: RedisCluster, on_cluster: Callable[..., FaultStage]
) -> None:
    more = re.search(r"with\s`redis\.cluster`\salso\s`([^`]+)`", (ROOT / "README.md").read_text())
    assert more
    rules = [*documented_rules()["stream-app"].split(), *more[1].split()]
    for server in redis_masters.masters:
        ask(server, "FLUSHALL")
        ask(server, "SCRIPT FLUSH")
        ask(server, "FUNCTION FLUSH")
        ask(server, "ACL SETUSER", "stream-app", "reset", "on", ">a-secret", *rules)
    address = redis_masters.masters[0].address
    stage = on_cluster(redis_masters, redis__url=f"redis://stream-app:a-secret@{address}/0")
    stage.fill(500)
    worker_log = stage.run("worker", "--until-end")
    assert "NOPERM" not in worker_log
    assert "other languages" not in worker_log
    prove(stage.case).holds()
    stage.run("doctor")
    stage.run("segments", "list")
    members = json.loads(stage.run("segments", "members", "any-colour", "--json"))["members"]
    stage.run("show", members[0]["user_id"])
    stage.run("rebuild", "--yes")
    assert [ask(master, "DBSIZE") for master in redis_masters.masters] == [0, 0, 0]
