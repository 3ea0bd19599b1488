"""Traces: what the hooks make of the packets that somebody asks about, a step for each hook that a packet meets.

While nobody traces, the packet path asks one question more, whether anybody does (`Queue.on_message`). While somebody
does, packets go through `Tracing.judge`, which looks at the connection before and after the hook. A trace keeps its
last steps in a ring, which its client reads in its own time; nobody waits for a client. What a trace costs is limited
for each second, and whatever it does not tell it counts.
"""

import time
from collections import deque
from collections.abc import Iterator
from typing import Final

import msgspec
import structlog

from conntrackd import api
from conntrackd.const import (
    CTINFO_NAMES,
    DROP,
    INVALID,
    IP_CT_ESTABLISHED,
    IP_CT_ESTABLISHED_REPLY,
    IP_CT_NEW,
    IP_CT_RELATED,
    IP_CT_RELATED_REPLY,
    IP_CT_UNTRACKED,
    IPPROTO_ICMP,
    IPPROTO_ICMPV6,
    IPS_CONFIRMED,
    MARK_CLASS_SHIFT,
    MARK_INVALID,
    NF_INET_LOCAL_IN,
    NF_INET_LOCAL_OUT,
    NF_INET_POST_ROUTING,
    NF_INET_PRE_ROUTING,
)
from conntrackd.core.conn import Conn
from conntrackd.core.tuples import invert
from conntrackd.daemon import flowrows
from conntrackd.daemon.control import QUIET, Asked, arguments
from conntrackd.daemon.flowanswers import Chosen
from conntrackd.daemon.links import Links
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.queue import Queue
from conntrackd.daemon.standin import stand_in
from conntrackd.hooks import Firewall
from conntrackd.policy.match import decide
from conntrackd.policy.ruleset import INVALID as ABOUT_INVALID
from conntrackd.wire.ip import packet_length, transport

TRACES_MAX: Final = 4
STEPS_MAX: Final = 1024  # that wait for a client
STEPS_PER_SECOND: Final = 1000  # of one trace
LOOKS_PER_SECOND: Final = 20_000  # packets that are compared with the filters; the others pass unseen
BYTES_MAX: Final = 2048  # of a packet, when its bytes are wanted
ICMP_HEADER: Final = 8  # in front of what an ICMP error quotes

HOOK_NAMES: Final = {
    NF_INET_PRE_ROUTING: "PREROUTING",
    NF_INET_LOCAL_IN: "INPUT",
    NF_INET_LOCAL_OUT: "OUTPUT",
    NF_INET_POST_ROUTING: "POSTROUTING",
}
CLASS_NAMES: Final = (None, "NEW", "ESTABLISHED", "RELATED", "INVALID", "UNTRACKED", None, None)
CTINFO_CLASSES: Final = {
    IP_CT_NEW: "NEW",
    IP_CT_ESTABLISHED: "ESTABLISHED",
    IP_CT_ESTABLISHED_REPLY: "ESTABLISHED",
    IP_CT_RELATED: "RELATED",
    IP_CT_RELATED_REPLY: "RELATED",
    IP_CT_UNTRACKED: "UNTRACKED",
}

FAILED: Final = DROP - 1  # in place of a verdict: our own code failed

log = structlog.get_logger()


class Trace:
    """What one client asked for, and what is there for it."""

    def __init__(self, chosen: Chosen | None, wants_bytes: bool) -> None:
        self.matches = chosen.matches if chosen is not None else None  # None: every packet
        self.wants_bytes = wants_bytes
        self.steps: deque[api.TraceStep] = deque()
        self.lost = 0  # steps that matched and are not told
        self.left = STEPS_PER_SECOND  # of this second

    def take(self) -> bool:
        """Whether there may be one step more in this second; if not it is counted as lost."""
        if self.left == 0:
            self.lost += 1
            return False
        self.left -= 1
        return True

    def add(self, step: api.TraceStep) -> None:
        """Keep a step; at the limit it takes the place of the oldest."""
        if len(self.steps) == STEPS_MAX:
            self.steps.popleft()
            self.lost += 1
        self.steps.append(step)


class Tracing:
    """All traces, and the two queues whose packets they are about."""

    def __init__(self, fw: Firewall, mark: Mark, queues: tuple[Queue, Queue], links: Links):
        self.seq = 0  # steps so far
        self._fw = fw
        self._mark = mark
        self._queues = queues
        self._links = links
        self._traces: list[Trace] = []
        self._second = 0
        self._looks = 0  # left in this second
        self._unseen = 0

    # --- The clients ----------------------------------------------------------------------------------------------

    def rows(self, asked: Asked) -> Iterator[msgspec.Struct | None] | None:
        """Begin a trace; None if that is not what is asked."""
        if asked.command != "trace":
            return None
        if len(self._traces) >= TRACES_MAX:
            raise api.RequestError(f"There are {TRACES_MAX} traces already: end one of them.")
        args = arguments(asked, api.TraceArgs)
        if args.bytes and not asked.may_change():
            raise api.RequestError(f"Capturing packets needs root, and you are {asked.who()}.")
        chosen = Chosen(args.filter, self._fw, self._links) if args.filter.strip() else None
        return self._follow(Trace(chosen, args.bytes))

    def _follow(self, trace: Trace) -> Iterator[msgspec.Struct | None]:
        self._traces.append(trace)
        self._switch()
        lost, unseen = 0, self._unseen
        try:
            yield api.TraceBegin(steps_per_second=STEPS_PER_SECOND, packets_per_second=LOOKS_PER_SECOND)
            while True:
                if trace.lost > lost or self._unseen > unseen:
                    yield api.TraceLost(steps=trace.lost - lost, packets=self._unseen - unseen)
                    lost, unseen = trace.lost, self._unseen
                yield trace.steps.popleft() if trace.steps else QUIET
        finally:
            self._traces.remove(trace)
            self._switch()

    def _switch(self) -> None:
        for queue in self._queues:
            queue.tracing = self if self._traces else None

    # --- The packets ----------------------------------------------------------------------------------------------

    def judge(self, queue: Queue, data: bytes, hook: int, mark: int, iif: int, oif: int) -> int:
        """Do what `queue.judge` does, and keep a step for every trace that the packet is of."""
        if queue.now_ms // 1000 != self._second:
            self._second = queue.now_ms // 1000
            self._looks = LOOKS_PER_SECOND
            for trace in self._traces:
                trace.left = STEPS_PER_SECOND
        if self._looks == 0:
            self._unseen += 1
            return queue.judge(data, hook, mark, iif, oif)
        self._looks -= 1
        packet = Packet(data, hook, mark, iif, oif, queue.now_ms, self._fw)
        bits = FAILED
        try:
            bits = queue.judge(data, hook, mark, iif, oif)
        finally:
            try:
                self._note(packet, bits)
            except Exception:
                log.exception("trace_failed")  # whatever is wrong with a trace, the packet has its verdict
        return bits

    def _note(self, packet: "Packet", bits: int) -> None:
        """Keep what came of a packet, for those who asked about such a one."""
        fw = self._fw
        ct = packet.find(fw) or packet.ct
        reason = "internal_error" if bits == FAILED else ""
        if bits == DROP:
            _, reason, rule, *_ = fw.drops[(fw.drops_next - 1) % len(fw.drops)]
        else:
            rule = _rule(fw, packet, ct, bits)
        subjects = _subjects(packet, ct, rule)
        step: api.TraceStep | None = None
        for trace in self._traces:
            matches = trace.matches
            if matches is not None and not any(matches(each, each, packet.now_ms) for each in subjects):
                continue
            if not trace.take():
                continue
            if step is None:
                step = self._step(packet, ct, bits, reason, rule)
                self.seq += 1
            trace.add(msgspec.structs.replace(step, data=packet.data[:BYTES_MAX]) if trace.wants_bytes else step)

    def _step(self, packet: "Packet", ct: Conn | None, bits: int, reason: str, rule: str) -> api.TraceStep:
        key, old = packet.key, packet.ct
        ctinfo = packet.ctinfo(self._fw)
        passed = bits >= 0
        return api.TraceStep(
            time=api.timestamp(time.time()),
            hook=HOOK_NAMES[packet.hook],
            packet=api.Packet(
                family=flowrows.family(key), protocol=flowrows.protocol(key[0]), protonum=key[0], **flowrows.ends(key)
            )
            if key
            else None,
            in_=self._links.interface(packet.iif),
            out=self._links.interface(packet.oif),
            length=packet_length(packet.data),
            zone=packet.zone,
            flow=ct.id if ct is not None and ct.id else None,
            class_=_class(ctinfo, bits if passed else self._mark.read(packet.mark)),
            ctinfo=CTINFO_NAMES.get(ctinfo),
            state_before=flowrows.state_name(old, packet.state) if old is not None else None,
            state=flowrows.state_name(ct, ct.state) if ct is not None else None,
            status_before=flowrows.status_names(packet.status) if old is not None else [],
            status=flowrows.status_names(ct.status) if ct is not None else [],
            rule=rule or None,
            verdict="accept" if passed else "drop" if bits == DROP else "failed",
            reason=reason or None,
            mark_before=packet.mark,
            mark=packet.mark & self._mark.keep | self._mark.lay[bits] if passed else packet.mark,
        )


class Packet:
    """A packet in front of a hook, and what the tracker knew of it then."""

    def __init__(self, data: bytes, hook: int, mark: int, iif: int, oif: int, now_ms: int, fw: Firewall) -> None:
        self.data = data
        self.hook = hook
        self.mark = mark
        self.iif = iif
        self.oif = oif
        self.now_ms = now_ms
        self.zone = fw.net.zone_of(iif, mark)
        self.key = fw.net.table.read_tuple(data[: packet_length(data)], 0, self.zone)
        self.ct = self.find(fw)
        self.state = self.ct.state if self.ct is not None else 0
        self.status = self.ct.status if self.ct is not None else 0
        self._counts = list(fw.net.stats.ctinfo)

    def find(self, fw: Firewall) -> Conn | None:
        """Look its connection up, or that of the packet which an ICMP error quotes; changes nothing."""
        if not self.key:
            return None
        ct = self._find(fw, self.key)
        if ct is None and self.key[0] in (IPPROTO_ICMP, IPPROTO_ICMPV6):
            at = transport(self.data, 0)[0] + ICMP_HEADER
            quoted = fw.net.table.read_tuple(self.data, at, self.zone)
            return self._find(fw, quoted) if quoted else None
        return ct

    def _find(self, fw: Firewall, key: bytes) -> Conn | None:
        table = fw.net.table
        ct = table.get(key, self.zone)
        if ct is not None and ct.expires_ms > self.now_ms:
            return ct
        return table.find_unconfirmed(key, self.zone)

    def ctinfo(self, fw: Firewall) -> int:
        """Say what the tracker has counted it as; -1: it was not tracked, but found again."""
        counts = fw.net.stats.ctinfo
        return next((ctinfo for ctinfo in CTINFO_NAMES if counts[ctinfo] != self._counts[ctinfo]), -1)


def _class(ctinfo: int, bits: int) -> str | None:
    """Name the class of a packet: what the tracker found, else what its mark says."""
    if ctinfo < 0:
        return CLASS_NAMES[bits >> MARK_CLASS_SHIFT]
    return "INVALID" if ctinfo >= INVALID else CTINFO_CLASSES[ctinfo]


def _rule(fw: Firewall, packet: Packet, ct: Conn | None, bits: int) -> str:
    """Name the rule by which a packet passes; "" where none was asked."""
    if bits < 0 or not packet.key:
        return ""
    if bits == MARK_INVALID:
        return decide(fw.ruleset, ABOUT_INVALID, packet.key, packet.iif, 0, packet.now_ms).name
    return ct.rule if ct is not None else ""


def _subjects(packet: Packet, ct: Conn | None, rule: str) -> list[Conn]:
    """Give the connections that filters are asked about.

    For a packet that has none these are the one that it would have begun and, as it may be a stray answer, the one
    that it would have answered.
    """
    key, iif, oif = packet.key, packet.iif, packet.oif
    if not key:
        return []
    if ct is None:
        stray = stand_in(invert(key) or key, oif, iif, rule, packet.now_ms, packet.zone)
        return [stand_in(key, iif, oif, rule, packet.now_ms, packet.zone), stray]
    if ct.status & IPS_CONFIRMED:
        return [ct]
    begun = stand_in(ct.orig, iif, oif, rule, packet.now_ms, packet.zone)  # with what the hook knows and it does not
    begun.state, begun.status, begun.created_ms = ct.state, ct.status, ct.created_ms
    return [begun]
