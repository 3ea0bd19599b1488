"""What the daemon says about itself: the rows behind each command of the control socket (api.py)."""

import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from ipaddress import ip_network
from socket import AF_INET, AF_INET6, inet_ntop
from typing import Any, Final

import msgspec

from conntrackd import api
from conntrackd.config import Config
from conntrackd.const import (
    CLOSED_NAMES,
    CTINFO_NAMES,
    IPCT_DESTROY,
    IPCT_NAMES,
    IPPROTO_GRE,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPPROTO_SCTP,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPPROTO_UDPLITE,
    STATUS_NAMES,
)
from conntrackd.core import compiled
from conntrackd.core.conn import Conn
from conntrackd.core.ecache import Event
from conntrackd.core.expect import EXPECT_FLAG_NAMES, Expect
from conntrackd.core.proto.sctp import STATE_NAMES as SCTP_STATE_NAMES
from conntrackd.core.proto.tcp_states import STATE_NAMES as TCP_STATE_NAMES
from conntrackd.core.tuples import PROTOCOL_NAMES
from conntrackd.daemon.control import QUIET, Asked
from conntrackd.daemon.links import Links
from conntrackd.daemon.queue import LATENCY_BOUNDS_US, KernelQueue, Queue, kernel_queues
from conntrackd.hooks import Firewall

NOTHING_KNOWN: Final = KernelQueue(portid=0, waiting=0, dropped_full=0, dropped_socket=0)
LATENCY_LABELS: Final = (*(str(bound) for bound in LATENCY_BOUNDS_US), "+Inf")
HOOKS: Final = (["PREROUTING", "OUTPUT"], ["POSTROUTING", "INPUT"])


class Answers:
    """Everything that can be asked for. `now_ms` is set by the loop whenever it wakes."""

    def __init__(
        self,
        version: str,
        config: Config,
        config_file: str,
        fw: Firewall,
        links: Links,
        queues: tuple[Queue, Queue],
        now_ms: int,
    ) -> None:
        self.now_ms = now_ms
        self._version = version
        self._config = config
        self._config_file = config_file
        self._fw = fw
        self._links = links
        self._queues = queues
        self._started_ms = now_ms

    def rows(self, asked: Asked) -> Iterator[msgspec.Struct | None] | None:
        """Begin to answer a command; None if it is none of these.

        Rows are made when they are asked for, so a big table costs little at a time.
        """
        command = asked.command
        if command == "flows":
            return self.flows()
        if command == "expectations":
            return self.expectations()
        if command == "status":
            return iter([self.status()])
        if command == "stats":
            return iter([self.stats()])
        if command == "drops":
            return self.drops()
        if command == "events":
            return self.events()
        return None

    def flows(self) -> Iterator[api.Flow]:
        """List the table: each connection that is there all the time, as it is when its turn comes."""
        for ct in self._fw.net.table.connections():
            if ct.expires_ms > self.now_ms:
                yield self._flow(ct)

    def expectations(self) -> Iterator[api.Expectation]:
        """List what helpers expect."""
        for expect in list(self._fw.net.table.expectations.by_id.values()):
            if expect.expires_ms > self.now_ms:
                yield self._expectation(expect)

    def _expectation(self, expect: Expect) -> api.Expectation:
        info = expect.master.help
        assert info is not None
        ends = _ends(expect.tuple)
        size = len(expect.tuple) - 5 >> 1
        prefix = int.from_bytes(expect.mask[1 : 1 + size], "big").bit_count()
        if prefix == 0:
            ends["src"] = None
        elif prefix < size * 8:
            ends["src"] = str(ip_network(f"{ends['src']}/{prefix}", strict=False))
        if "sport" in ends and expect.mask[-4:-2] == b"\0\0":
            ends["sport"] = None
        return api.Expectation(
            id=expect.id,
            family=_family(expect.tuple),
            protocol=_protocol(expect.tuple[0]),
            protonum=expect.tuple[0],
            zone=expect.master.zone,
            timeout_seconds=max(0, (expect.expires_ms - self.now_ms) // 1000),
            **ends,
            helper=info.helper.name,
            class_=info.helper.policies[expect.expect_class].name or None,
            flags=[name for bit, name in EXPECT_FLAG_NAMES.items() if expect.flags & bit],
            master=expect.master.id,
        )

    def _flow(self, ct: Conn) -> api.Flow:
        labels = self._fw.net.table.labels.get(ct.id, 0)
        return api.Flow(
            id=ct.id,
            family=_family(ct.orig),
            protocol=_protocol(ct.protonum),
            protonum=ct.protonum,
            zone=ct.zone,
            state=_state(ct, ct.state),
            status=_status(ct.status),
            timeout_seconds=max(0, (ct.expires_ms - self.now_ms) // 1000),
            age_seconds=(self.now_ms - ct.created_ms) // 1000,
            orig=api.Direction(**_ends(ct.orig), packets=ct.packets_orig, bytes=ct.bytes_orig),
            reply=api.Direction(**_ends(ct.reply), packets=ct.packets_reply, bytes=ct.bytes_reply),
            mark=ct.mark,
            helper=ct.help.helper.name if ct.help is not None else None,
            master=ct.master.id if ct.master is not None else None,
            rule=ct.rule,
            in_=self.interface(ct.iif),
            out=self.interface(ct.oif),
            labels=f"{labels:032x}" if labels else msgspec.UNSET,
        )

    def events(self) -> Iterator[msgspec.Struct | None]:
        """Tell what happens from now on."""
        ring = self._fw.net.events
        listener = ring.listen()
        told = 0
        try:
            while True:
                event = ring.read(listener)
                if listener.lost > told:
                    yield api.Lost(count=listener.lost - told)
                    told = listener.lost
                yield QUIET if event is None else self._event(event)
        finally:
            ring.leave()

    def _event(self, event: Event) -> api.Event:
        ct = event.ct
        flow = msgspec.structs.replace(
            self._flow(ct),
            state=_state(ct, event.state),
            status=_status(event.status),
            timeout_seconds=max(0, (event.expires_ms - event.now_ms) // 1000),
            age_seconds=(event.now_ms - ct.created_ms) // 1000,
            mark=event.mark,
        )
        destroyed = event.bits & IPCT_DESTROY
        return api.Event(
            type=event.kind(),
            time=self._moment(event.now_ms),
            changes=[name for bit, name in IPCT_NAMES.items() if event.bits & bit],
            reason=CLOSED_NAMES[event.reason] if destroyed else None,
            flow=flow,
        )

    def _moment(self, at_ms: int) -> str:
        """Write a time of the monotonic clock as one of the wall clock, which may have been set since then."""
        moment = datetime.fromtimestamp(time.time() - (self.now_ms - at_ms) / 1000, UTC)
        return moment.isoformat(timespec="milliseconds")

    def drops(self) -> Iterator[api.Drop]:
        """List the recent drops, the oldest first."""
        fw = self._fw
        newest = fw.drops_next % len(fw.drops) if fw.drops else 0
        for dropped_ms, reason, rule, key, iif, oif in fw.drops[newest:] + fw.drops[:newest]:
            yield api.Drop(
                time=self._moment(dropped_ms),
                reason=reason,
                rule=rule or None,
                family=_family(key) if key else None,
                protocol=_protocol(key[0]) if key else None,
                protonum=key[0] if key else None,
                **(_ends(key) if key else {"src": None, "dst": None}),
                in_=self.interface(iif),
                out=self.interface(oif),
            )

    def status(self) -> api.Status:
        """Describe the daemon as a whole."""
        net, ruleset = self._fw.net, self._fw.ruleset
        zones = {number: name for name, number in ruleset.zones.items()}
        return api.Status(
            version=self._version,
            core="compiled" if compiled() else "pure",
            pid=os.getpid(),
            uptime_seconds=(self.now_ms - self._started_ms) // 1000,
            config=self._config_file,
            generation=ruleset.generation,
            flows=net.table.count,
            flows_max=net.sysctl.max,
            unconfirmed=net.table.unconfirmed_count(),
            unconfirmed_max=net.sysctl.unconfirmed_max,
            queues=self._queue_statuses(),
            interfaces=[
                api.Interface(index, name, zones.get(ruleset.zone_of.get(index, -1)))
                for index, name in sorted(self._links.names.items())
            ],
        )

    def stats(self) -> api.Stats:
        """Give all counters."""
        stats = self._fw.net.stats
        return api.Stats(
            found=stats.found,
            invalid=stats.invalid(),
            insert=stats.insert,
            insert_failed=stats.insert_failed,
            drop=stats.drop,
            early_drop=stats.early_drop,
            error=stats.error(),
            search_restart=stats.search_restart,
            clash_resolve=stats.clash_resolve,
            chaintoolong=stats.chaintoolong,
            expect_new=stats.expect_new,
            expect_create=stats.expect_create,
            expect_delete=stats.expect_delete,
            created=stats.created,
            destroyed=stats.destroyed,
            unconfirmed_expired=stats.unconfirmed_expired,
            unconfirmed_full=stats.unconfirmed_full,
            expired_when_full=stats.expired_when_full,
            emergency_drop=stats.emergency_drop,
            adaptive_drop=stats.adaptive_drop,
            table_full=stats.table_full,
            source_full=stats.source_full,
            zone_full=stats.zone_full,
            closed=dict(zip(CLOSED_NAMES, stats.closed, strict=True)),
            listeners=self._fw.net.events.listeners,
            events=self._fw.net.events.seq,
            events_lost=self._fw.net.events.lost,
            ctinfo={name: stats.ctinfo[ctinfo] for ctinfo, name in CTINFO_NAMES.items()},
            drops=dict(self._fw.drop_counts),
            rules=[
                api.RuleHits(rule.name, "accept" if rule.accept else "drop", rule.hits)
                for rule in self._fw.ruleset.rules
            ],
            queues=self._queue_statuses(),
        )

    def _queue_statuses(self) -> list[api.QueueStatus]:
        kernel = kernel_queues()
        statuses = []
        for queue, hooks in zip(self._queues, HOOKS, strict=True):
            known = kernel.get(queue.number, NOTHING_KNOWN)
            statuses.append(
                api.QueueStatus(
                    number=queue.number,
                    hooks=hooks,
                    max_length=self._config.queue.max_length,
                    packets=queue.packets,
                    dropped=queue.dropped,
                    errors=queue.errors,
                    verdict_errors=queue.verdict_errors,
                    latency_us=dict(zip(LATENCY_LABELS, queue.latency, strict=True)),
                    socket_buffer=queue.socket_buffer(),
                    waiting=known.waiting,
                    dropped_full=known.dropped_full,
                    dropped_socket=known.dropped_socket,
                )
            )
        return statuses

    def interface(self, index: int) -> str | None:
        """Name an interface; one that is gone keeps its number."""
        return self._links.names.get(index, f"if{index}") if index else None


def _state(ct: Conn, state: int) -> str | None:
    if ct.protonum == IPPROTO_TCP:
        return TCP_STATE_NAMES[state]
    return SCTP_STATE_NAMES[state] if ct.protonum == IPPROTO_SCTP else None


def _status(status: int) -> list[str]:
    return [name for bit, name in STATUS_NAMES.items() if status & bit]


def _family(key: bytes) -> str:
    return "ipv4" if len(key) == 13 else "ipv6"


def _protocol(protonum: int) -> str:
    return PROTOCOL_NAMES.get(protonum, f"proto-{protonum}")


def _ends(key: bytes) -> dict[str, Any]:
    """Spell a tuple out: the addresses, and what its protocol has besides, by the names of api.Direction."""
    family, size = (AF_INET, 4) if len(key) == 13 else (AF_INET6, 16)
    ends: dict[str, Any] = {
        "src": inet_ntop(family, key[1 : 1 + size]),
        "dst": inet_ntop(family, key[1 + size : 1 + 2 * size]),
    }
    protonum = key[0]
    first, second = int.from_bytes(key[-4:-2], "big"), int.from_bytes(key[-2:], "big")
    if protonum in (IPPROTO_TCP, IPPROTO_UDP, IPPROTO_SCTP, IPPROTO_UDPLITE):
        return ends | {"sport": first, "dport": second}
    if protonum in (IPPROTO_ICMP, IPPROTO_ICMPV6):
        return ends | {"type": key[-2], "code": key[-1], "id": first}
    if protonum == IPPROTO_GRE:
        return ends | {"srckey": first, "dstkey": second}
    return ends
