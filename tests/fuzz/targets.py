"""What is fuzzed: functions that take any bytes and raise AssertionError, or anything else, only if we are wrong.

The bytes are a conversation: a byte of settings, then per packet a byte of circumstances, two bytes of length and the
packet. `pack` makes them of packets.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Final

from conntrackd.config import Config, parse
from conntrackd.const import (
    IPS_CONFIRMED,
    IPS_DYING,
    MARK_UNCONFIRMED,
    NF_INET_LOCAL_IN,
    NF_INET_LOCAL_OUT,
    NF_INET_POST_ROUTING,
    NF_INET_PRE_ROUTING,
)
from conntrackd.core.conntrack import Conntrack, confirm, conntrack_in, gc
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import format_tuple, get_tuple, invert, packet_tuple
from conntrackd.hooks import Firewall, post_routing, pre_routing
from conntrackd.policy.compile import compile as compile_ruleset
from conntrackd.policy.ruleset import Ruleset
from conntrackd.wire.ip import packet_length, transport
from tests.fuzz import helpers, snapshots
from tests.fuzz.invariants import check_answer, check_drops, check_mark, check_table

PACKETS_MAX: Final = 64  # in one conversation
START_MS: Final = 10_000_000

# The byte of settings.
VERIFY_CHECKSUMS: Final = 0x01
SMALL_LIMITS: Final = 0x04  # and tcp_loose, be_liberal, ignore_invalid_rst in the bits above
# The byte of circumstances.
FROM_SERVER: Final = 0x01
LOST: Final = 0x02  # between the hooks
SKIPS_FIRST_HOOK: Final = 0x04
CLOBBERED: Final = 0x08  # the mark
OWN: Final = 0x10  # the router's own, or to it
JUMPS_MS: Final = (0, 700, 3_100, 130_000)  # before the packet: the two highest bits

POLICY: Final = """
version = 1
[policy]
invalid = "%s"
fragment = "%s"
related = "%s"
[zones]
lan = { interfaces = "lan" }
wan = { interfaces = "wan" }
[[rule]]
name = "out"
from = ["lan", "self"]
action = "accept"
[[rule]]
name = "udp"
protocol = "udp"
action = "accept"
[[rule]]
name = "rest"
log = true
action = "reject"
"""


def pack(packets: Iterable[tuple[int, bytes]], settings: int = 1) -> bytes:
    """Write a conversation of (circumstances, packet)."""
    parts = [bytes((circumstances,)) + len(data).to_bytes(2, "big") + data for circumstances, data in packets]
    return bytes((settings,)) + b"".join(parts)


def unpack(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Read a conversation; the last packet may be cut."""
    at = 1
    for _ in range(PACKETS_MAX):
        if at + 3 > len(data):
            return
        size = int.from_bytes(data[at + 1 : at + 3], "big")
        yield data[at], data[at + 3 : at + 3 + size]
        at += 3 + size


def tracker(settings: int) -> Conntrack:
    sysctl = Sysctl()
    if settings & SMALL_LIMITS:
        sysctl.max = 3
        sysctl.unconfirmed_max = 4
    sysctl.tcp_loose = 0 if settings & 0x08 else 1
    sysctl.tcp_be_liberal = settings >> 4 & 1
    sysctl.tcp_ignore_invalid_rst = settings >> 5 & 1
    return Conntrack(sysctl)


def readers(data: bytes) -> None:
    """The header readers stay inside the packet, and a tuple that can be inverted is its inverse's inverse."""
    packet_length(data)
    if data:
        offset, protonum = transport(data, 0)
        assert -64 < offset <= len(data) + 0xFF * 8 + 8
        assert 0 <= protonum <= 255
    for key in (packet_tuple(data), get_tuple(data, 0), get_tuple(data, min(28, len(data)))):
        if key:
            assert len(key) in (13, 37)
            format_tuple(key)
            back = invert(key)
            assert not back or invert(back) == key


def conntrack(data: bytes) -> None:
    """Whatever packets come, conntrack_in and confirm answer, count each once, and leave the table in order."""
    settings = data[0] if data else 0
    net = tracker(settings)
    checksum = settings & VERIFY_CHECKSUMS != 0
    now_ms = START_MS
    for count, (circumstances, packet) in enumerate(unpack(data), 1):
        now_ms += JUMPS_MS[circumstances >> 6]
        ctinfo, ct = conntrack_in(net, packet, checksum, now_ms)
        check_answer(ctinfo, ct)
        if ct is not None and not circumstances & LOST and not ct.status & (IPS_CONFIRMED | IPS_DYING):
            confirm(net, ct, now_ms)
        check_table(net, now_ms)
        assert sum(net.stats.ctinfo) == count
        gc(net, now_ms)
    check_table(net, now_ms)


def hooks(data: bytes) -> None:
    """Whatever packets cross the hooks in whatever order and with whatever marks, each gets a verdict."""
    settings = data[0] if data else 0
    fw = Firewall(tracker(settings), policy(settings & 0x40 != 0, settings & 0x80 == 0))
    fw.checksum = settings & VERIFY_CHECKSUMS != 0
    now_ms = START_MS
    for circumstances, packet in unpack(data):
        now_ms += JUMPS_MS[circumstances >> 6]
        iif, oif = (2, 1) if circumstances & FROM_SERVER else (1, 2)
        first, second = NF_INET_PRE_ROUTING, NF_INET_POST_ROUTING
        if circumstances & OWN and circumstances & FROM_SERVER:
            second, oif = NF_INET_LOCAL_IN, 0
        elif circumstances & OWN:
            first, iif = NF_INET_LOCAL_OUT, 0
        mark = 0
        if not circumstances & SKIPS_FIRST_HOOK:
            mark = pre_routing(fw, packet, first, iif, now_ms)
            check_mark(mark)
        clobbered = circumstances & (CLOBBERED | SKIPS_FIRST_HOOK)
        if not circumstances & LOST and mark >= 0 and (mark & MARK_UNCONFIRMED or clobbered):
            mark = len(packet) % 64 if circumstances & CLOBBERED else mark
            mark = post_routing(fw, packet, mark, second, iif, oif, now_ms)
            check_mark(mark)
            assert mark < 0 or not mark & MARK_UNCONFIRMED, "what has left is confirmed"
        check_table(fw.net, now_ms)
        check_drops(fw)
        gc(fw.net, now_ms)


@cache
def checked_policy(invalid: bool, related: bool) -> Config:
    """From the client's interface anywhere, from elsewhere UDP only; the rest is refused with an answer."""
    words = ("drop", "accept")
    return parse((POLICY % (words[invalid], words[invalid], words[related])).encode(), "fuzz.toml")


def policy(invalid: bool, related: bool) -> Ruleset:
    ruleset = compile_ruleset(checked_policy(invalid, related), 1)
    ruleset.set_links({1: "lan", 2: "wan"})
    return ruleset


TARGETS: Final[dict[str, Callable[[bytes], None]]] = {
    "readers": readers,
    "conntrack": conntrack,
    "hooks": hooks,
    "snapshot": snapshots.snapshot,
    **helpers.targets(),
}
