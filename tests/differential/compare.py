"""Kernel and core side by side: the same packets, the answers compared after every one.

The core's clock is the real one, read when the packet goes into the kernel. The kernel counts in jiffies, so near a
deadline (expiry, the two seconds after which UDP is a stream) both may be right: a conversation that meets one within
MARGIN_MS is given up there and counted as ambiguous, never as a mismatch.
"""

import heapq
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

from conntrackd import const
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import confirm, conntrack_in, gc
from conntrackd.core.net import Conntrack
from conntrackd.core.proto.sctp import STATE_NAMES as SCTP_STATES
from conntrackd.core.proto.sctp import SctpConn
from conntrackd.core.proto.tcp_conn import TcpConn, sides
from conntrackd.core.proto.tcp_states import STATE_NAMES as TCP_STATES
from conntrackd.core.proto.udp import UdpConn
from tests.differential.generate.path import Conversation
from tests.differential.kernel import Entry, Passage, Router
from tests.differential.profiles import PROFILES, sysctl

MARGIN_MS: Final = 12  # a tick of the kernel is 4 ms; reading the clock and going in takes some of our own
SLOW_MS: Final = 300  # a packet that took so long proves nothing: the kernel's clock has gone on
CAPTURE: Final = 3900  # the daemon sees this much of a packet at most; its checksum is then taken on trust
_ACTIVE: Final = 3000  # conversations at the same time: some wait for seconds
_STATUS: Final = const.IPS_EXPECTED | const.IPS_SEEN_REPLY | const.IPS_ASSURED | const.IPS_CONFIRMED | const.IPS_DYING


class AmbiguousTimingError(Exception):
    """A packet met a deadline so closely that either answer is right."""


@dataclass
class Mismatch:
    """Where a conversation parted: the step, what it was about, both answers."""

    conversation: Conversation
    step: int
    about: str
    kernel: str
    ours: str

    def signature(self) -> tuple[str, str, str, str]:
        """Equal for mismatches that look like the same bug."""
        return self.conversation.protocol, self.about, self.kernel.split()[0], self.ours.split()[0]


def _class_name(ctinfo: int) -> str:
    return "invalid" if ctinfo >= const.INVALID else const.CTINFO_NAMES[ctinfo]


class Twin:
    """One router namespace and one core with the same settings."""

    def __init__(self, profile: str) -> None:
        self.profile = profile
        self.router = Router.tracking(PROFILES[profile].settings)
        self._begin()

    def _begin(self) -> None:
        self.net = Conntrack(sysctl(self.profile))
        self._stats_before = self.router.stats()
        self._next_gc = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.router.__exit__(kind, error, at)

    def empty(self) -> None:
        """Forgets every connection on both sides."""
        self.router.flush()
        self._begin()

    def forward(self, side: int, packet: bytes, watch: Iterable[bytes]) -> tuple[str, str, str] | int | None:
        """Sends one packet both ways. Returns its ctinfo, None if the kernel kept it from everybody, or a difference.

        A difference is what it is about, the kernel's answer, ours.
        """
        router, net = self.router, self.net
        now = time.monotonic_ns() // 1_000_000
        passage = router.forward(side, packet)
        late = time.monotonic_ns() // 1_000_000
        self._unambiguous(watch, now, late)
        if now >= self._next_gc:
            self._next_gc = gc(net, now)
        if passage.data is None:
            return None
        answer = self._compare(passage, now, watch)
        if isinstance(answer, tuple):
            # Whoever holds the processor up between packet and look makes both right, too.
            late = time.monotonic_ns() // 1_000_000
            self._unambiguous(watch, now, late)
            if late - now > SLOW_MS:
                raise AmbiguousTimingError
        return answer

    def _compare(self, passage: Passage, now: int, watch: Iterable[bytes]) -> tuple[str, str, str] | int:
        """Judges what the kernel has judged, and compares: the ctinfo, or a difference."""
        router, net = self.router, self.net
        ctinfo = self._ours(passage, now)
        if _class_name(ctinfo) != _class_name(passage.ctinfo):
            return "classification", _class_name(passage.ctinfo), const.CTINFO_NAMES[ctinfo]
        for key in watch:
            entry = router.entry(key)
            ct = net.table.get(key)
            if ct is not None and ct.expires_ms <= now:
                ct = None
            if ct is None:
                if entry is None:
                    continue
                return "entry", _describe_entry(entry), "absent"
            if entry is None:
                return "entry", "absent", _describe_conn(ct, now)
            about = _difference(entry, ct, now)
            if about:
                return about, _describe_entry(entry), _describe_conn(ct, now)
        return ctinfo

    def _ours(self, passage: Passage, now: int) -> int:
        """What the daemon does with a packet that the router lets through, or drops between the hooks."""
        assert passage.data is not None
        ctinfo, ct = conntrack_in(self.net, passage.data[:CAPTURE], True, now)
        if ct is not None and not ct.status & const.IPS_CONFIRMED and ctinfo in (const.IP_CT_NEW, const.IP_CT_RELATED):
            if passage.left:
                confirm(self.net, ct, now)
            else:
                # The kernel's unconfirmed connection dies with its packet. Ours would wait for a second packet for
                # some seconds (docs/differences.md).
                self.net.table.drop_unconfirmed(ct)
        return ctinfo

    def _unambiguous(self, watch: Iterable[bytes], now: int, late: int) -> None:
        for key in watch:
            ct = self.net.table.get(key)
            if ct is None:
                continue
            deadlines = [ct.expires_ms]
            if isinstance(ct, UdpConn):
                deadlines.append(ct.stream_ms)
            if any(now - MARGIN_MS < deadline < late + MARGIN_MS for deadline in deadlines):
                raise AmbiguousTimingError

    def differences(self) -> list[str]:
        """Compares what was not compared packet by packet: entries that nobody watched (but those about to expire)
        and the counters of `conntrack -S`.
        """
        now = time.monotonic_ns() // 1_000_000
        kernel = self.router.entries()
        ours = {ct.orig: ct for ct in self.net.table.connections()}
        stats = self.net.stats
        # The kernel's `insert` and `found` mean other things (insertions by ctnetlink, taken NAT tuples).
        counters = {
            "invalid": stats.invalid(),
            "error": stats.error(),
            "insert_failed": stats.insert_failed,
            "drop": stats.drop,
            "early_drop": stats.early_drop,
            "clash_resolve": stats.clash_resolve,
        }
        counted = self.router.stats()
        return (
            [
                f"kernel only: {_describe_entry(entry)}"
                for key, entry in kernel.items()
                if entry.timeout > 1 and key not in ours
            ]
            + [
                f"ours only: {_describe_conn(ct, now)}"
                for key, ct in ours.items()
                if key not in kernel and ct.expires_ms > now + 3000
            ]
            + [
                f"counter {name}: kernel {counted[name] - self._stats_before[name]}, ours {value}"
                for name, value in counters.items()
                if value != counted[name] - self._stats_before[name]
            ]
        )


def _difference(entry: Entry, ct: Conn, now: int) -> str:
    """What an entry and a connection disagree on; empty if on nothing."""
    if entry.orig != ct.orig:
        return "original direction"
    if (entry.state or 0) != getattr(ct, "state", 0):
        return "state"
    if (entry.status ^ ct.status) & _STATUS:
        return "status"
    if entry.inner != _inner(ct):
        return "protocol's own"
    if abs(entry.timeout - (ct.expires_ms - now) // 1000) > 1:
        return "timeout"
    if (entry.packets_orig, entry.packets_reply) != (ct.packets_orig, ct.packets_reply):
        return "packets"
    if (entry.bytes_orig, entry.bytes_reply) != (ct.bytes_orig, ct.bytes_reply):
        return "bytes"
    return ""


def _inner(ct: Conn) -> tuple[int, ...]:
    """What ctnetlink would tell of our connection's protocol."""
    if isinstance(ct, TcpConn):
        original, replier = sides(ct)
        return original.scale, replier.scale, original.flags, replier.flags
    if isinstance(ct, SctpConn):
        return tuple(ct.vtag)
    return ()


def _describe(
    protonum: int, state: int | None, status: int, inner: tuple[int, ...], timeout: int, counts: tuple[int, ...]
) -> str:
    names = {const.IPPROTO_TCP: TCP_STATES, const.IPPROTO_SCTP: SCTP_STATES}.get(protonum)
    bits = " ".join(name for bit, name in const.STATUS_NAMES.items() if status & bit)
    state_name = "" if names is None else f"{names[state or 0]} "
    own = f" {tuple(map(hex, inner))}" if inner else ""
    return f"{state_name}{timeout}s [{bits}]{own} packets/bytes {counts}"


def _describe_entry(entry: Entry) -> str:
    counts = (entry.packets_orig, entry.bytes_orig, entry.packets_reply, entry.bytes_reply)
    status = entry.status & _STATUS
    return f"{_describe(entry.orig[0], entry.state, status, entry.inner, entry.timeout, counts)} {entry.orig.hex()}"


def _describe_conn(ct: Conn, now: int) -> str:
    counts = (ct.packets_orig, ct.bytes_orig, ct.packets_reply, ct.bytes_reply)
    state = ct.state if isinstance(ct, TcpConn | SctpConn) else None
    timeout = (ct.expires_ms - now) // 1000
    return f"{_describe(ct.protonum, state, ct.status, _inner(ct), timeout, counts)} {ct.orig.hex()}"


def replay(twin: Twin, conversation: Conversation, say: Callable[[str], None] | None = None) -> Mismatch | None:
    """Holds one conversation alone, with its waits."""
    for number, step in enumerate(conversation.steps):
        time.sleep(step.delay_ms / 1000)
        answer = twin.forward(step.side, step.data, conversation.watch)
        if isinstance(answer, tuple):
            return Mismatch(conversation, number, *answer)
        if say is not None:
            say("not seen" if answer is None else const.CTINFO_NAMES[answer])
    return None


@dataclass
class Tally:
    """What was compared."""

    packets: int = 0
    conversations: int = 0
    ambiguous: int = 0
    unseen: int = 0
    seconds: float = 0.0
    protocols: Counter[str] = field(default_factory=Counter)
    ctinfo: Counter[str] = field(default_factory=Counter)
    states: Counter[str] = field(default_factory=Counter)
    reached: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))  # classes by protocol
    mismatches: list[Mismatch] = field(default_factory=list)
    strays: list[str] = field(default_factory=list)


def run(
    twins: Mapping[str, Twin], conversations: Iterable[Conversation], tally: Tally, tick: Callable[[], bool]
) -> None:
    """Holds conversations, many at a time, until they end or `tick` says stop; then compares the whole tables.

    `tick` is called once per packet. Conversations that have begun are always finished.
    """
    begun = time.monotonic()
    source = iter(conversations)
    # Due time in ms, tie breaker, conversation, next step.
    waiting: list[tuple[int, int, Conversation, int]] = []
    order = 0
    more = True
    spoiled: set[str] = set()  # profiles in which one side has met a packet that the other has not judged
    while more or waiting:
        now = time.monotonic_ns() // 1_000_000
        if more and (not waiting or waiting[0][0] > now) and len(waiting) < _ACTIVE:
            conversation = next(source, None)
            if conversation is None:
                more = False
            elif conversation.steps:
                tally.conversations += 1
                order += 1
                heapq.heappush(waiting, (now + conversation.steps[0].delay_ms, order, conversation, 0))
            continue
        due, _, conversation, number = heapq.heappop(waiting)
        if due > now:
            time.sleep((due - now) / 1000)
        step = conversation.steps[number]
        twin = twins[conversation.profile]
        tally.packets += 1
        tally.protocols[conversation.protocol] += 1
        try:
            answer = twin.forward(step.side, step.data, conversation.watch)
        except AmbiguousTimingError:
            tally.ambiguous += 1
            spoiled.add(conversation.profile)
            continue
        if isinstance(answer, tuple):
            tally.mismatches.append(Mismatch(conversation, number, *answer))
            spoiled.add(conversation.profile)
        else:
            if answer is None:
                tally.unseen += 1
            else:
                tally.ctinfo[const.CTINFO_NAMES[answer]] += 1
                tally.reached[conversation.protocol].add(_class_name(answer))
                ct = twin.net.table.get(conversation.watch[0])
                if isinstance(ct, TcpConn):
                    tally.states["tcp " + TCP_STATES[ct.state]] += 1
                elif isinstance(ct, SctpConn):
                    tally.states["sctp " + SCTP_STATES[ct.state]] += 1
            number += 1
            if number < len(conversation.steps):
                order += 1
                now = time.monotonic_ns() // 1_000_000
                heapq.heappush(waiting, (now + conversation.steps[number].delay_ms, order, conversation, number))
        if not tick():
            more = False
    for profile, twin in twins.items():
        if profile not in spoiled:
            tally.strays += [f"{profile}: {line}" for line in twin.differences()]
        twin.empty()
    tally.seconds += time.monotonic() - begun
