"""Fuzzing of helpers: whatever a connection's payload is, its helper opens nothing but what its policies allow.

The bytes are a byte of settings, then per message a byte of circumstances, two bytes of length and the payload.
"""

from collections.abc import Callable
from functools import partial
from typing import Final

from conntrackd.const import (
    IPPROTO_GRE,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPS_CONFIRMED,
    IPS_SEEN_REPLY,
    NF_ACCEPT,
    NF_DROP,
)
from conntrackd.core.conn import Conn
from conntrackd.core.conntrack import Conntrack, gc, new_conn
from conntrackd.core.expect import EXPECT_INACTIVE, Expect
from conntrackd.core.helper import Message, assign_helper
from conntrackd.core.helpers import HELPERS
from conntrackd.core.helpers.sip import UINT
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.tuples import destination, invert, source

# Target, helper, protocol and port of the connection, and which conversations of the generator it begins with.
TARGETS: Final = (
    ("amanda", "amanda", IPPROTO_UDP, 10080, ("amanda",)),
    ("broadcast", "netbios-ns", IPPROTO_UDP, 137, ("tftp",)),
    ("ftp", "ftp", IPPROTO_TCP, 21, ("ftp",)),
    ("irc", "irc", IPPROTO_TCP, 6667, ("irc",)),
    ("pptp", "pptp", IPPROTO_TCP, 1723, ("pptp",)),
    ("sane", "sane", IPPROTO_TCP, 6566, ("sane",)),
    ("sip-tcp", "sip", IPPROTO_TCP, 5060, ("sip call", "sip register")),
    ("sip-udp", "sip", IPPROTO_UDP, 5060, ("sip call", "sip register")),
    ("tftp", "tftp", IPPROTO_UDP, 69, ("tftp",)),
)

# What they may expect.
OPENS: Final = {"pptp": (IPPROTO_GRE,), "tftp": (IPPROTO_UDP,), "netbios-ns": (IPPROTO_UDP,)}
ANYWHERE: Final = ("irc", "netbios-ns")  # whose expectations are open to other sources than the other end

IPV6: Final = 0x01  # of the settings
EXPECT_FEW: Final = 0x02
REPLY: Final = 0x01  # of the circumstances
CUT: Final = 0x02  # more was sent than was captured
ELSEWHERE: Final = 0x04  # not where the segment before left off
JUMPS_MS: Final = (0, 700, 3_100, 130_000)
MESSAGES_MAX: Final = 64
START_MS: Final = 10_000_000


def converse(helper: str, protonum: int, port: int, data: bytes) -> None:
    """Hold a conversation on a connection with a helper."""
    settings = data[0] if data else 0
    sysctl = Sysctl()
    if settings & EXPECT_FEW:
        sysctl.expect_max = 2
    net = Conntrack(sysctl)
    now_ms = START_MS
    ct = connection(net, helper, protonum, port, settings & IPV6 != 0)
    if ct.help is None:
        return  # the helper does not know the family
    seq = [1000, 0xFFFFFFF0]
    at = 1
    for _ in range(MESSAGES_MAX):
        if at + 3 > len(data):
            return
        circumstances, size = data[at], int.from_bytes(data[at + 1 : at + 3], "big")
        payload = data[at + 3 : at + 3 + size]
        at += 3 + size
        now_ms += JUMPS_MS[circumstances >> 6]
        side = circumstances & REPLY
        if circumstances & ELSEWHERE:
            seq[side] = seq[side] + 7 & 0xFFFFFFFF
        missing = 1000 if circumstances & CUT else 0
        if not payload and protonum == IPPROTO_TCP:
            continue
        verdict = ct.help.helper.help(net, ct, Message(payload, missing, seq[side], side != 0), now_ms)
        assert verdict in (NF_ACCEPT, NF_DROP)
        seq[side] = seq[side] + len(payload) + missing & 0xFFFFFFFF
        check_expectations(net, ct, now_ms)
        gc(net, now_ms)
        if ct.expires_ms <= now_ms:
            break
    net.table.kill(ct, now_ms)
    expectations = net.table.expectations
    assert not expectations.by_id
    assert not expectations.hash
    assert not net.table.gre_keymap
    assert net.stats.expect_create == net.stats.expect_delete


def connection(net: Conntrack, helper: str, protonum: int, port: int, ipv6: bool) -> Conn:
    """Make a confirmed connection that was answered, as the first packet that helpers read finds it."""
    size = 16 if ipv6 else 4
    ends = (b"\x0a" + bytes(size - 2) + b"\x01", b"\x0a" + bytes(size - 2) + b"\xff")
    key = bytes((protonum,)) + ends[0] + ends[1] + (4000).to_bytes(2, "big") + port.to_bytes(2, "big")
    ct = new_conn(key, invert(key), START_MS)
    assign_helper(ct, HELPERS[helper])
    ct.expires_ms = 3_000_000
    ct.status |= IPS_SEEN_REPLY
    net.table.insert(ct, START_MS)
    assert ct.status & IPS_CONFIRMED
    if not ipv6:
        net.broadcasts[ends[1]] = bytes((255, 255, 255, 0))
    return ct


def check_expectations(net: Conntrack, ct: Conn, now_ms: int) -> None:
    """Nothing is expected that the policies do not allow, nor for an address that is no end of the connection."""
    info = ct.help
    assert info is not None
    expectations = net.table.expectations
    assert list(expectations.by_id.values()) == sorted(info.expectations, key=lambda expect: expect.id)
    assert sum(map(len, expectations.hash.values())) == len(expectations.by_id)
    assert all(expectations.hash.values())
    assert net.stats.expect_create - net.stats.expect_delete == len(expectations.by_id)
    assert len(expectations.by_id) <= net.sysctl.expect_max
    for number, policy in enumerate(info.helper.policies):
        alive = [expect for expect in info.expectations if expect.expect_class == number and expect.expires_ms > now_ms]
        assert len(alive) <= policy.max_expected
    for expect in info.expectations:
        check_expect(ct, expect, now_ms)
    assert len(net.table.gre_keymap) <= 2


def check_expect(ct: Conn, expect: Expect, now_ms: int) -> None:
    assert ct.help is not None
    helper = ct.help.helper
    assert len(expect.tuple) == len(expect.mask) == len(ct.orig)
    assert expect.tuple[0] in OPENS.get(helper.name, (IPPROTO_TCP, IPPROTO_UDP))
    ends = (source(ct.orig), destination(ct.orig))
    target = destination(expect.tuple)
    assert target in ends
    if helper.name not in ANYWHERE:
        assert source(expect.mask) == b"\xff" * len(target)
        assert source(expect.tuple) in ends
        assert source(expect.tuple) != target
    assert destination(expect.mask) + expect.mask[-2:] + expect.mask[:1] == b"\xff" * (len(target) + 3)
    longest = helper.policies[expect.expect_class].timeout_ms
    if helper.name == "sip" and not expect.flags & EXPECT_INACTIVE:
        longest = UINT * 1000  # what a registrar agrees to; it ends with its master, too
    assert expect.expires_ms <= now_ms + longest


def seeds(target: str) -> list[bytes]:
    """Conversations to begin with: what both sides say on the control connection."""
    from tests.differential.generate.helpers import exchange

    found = []
    (names,) = (each[4] for each in TARGETS if f"helper-{each[0]}" == target)
    for index in range(24):
        steps = exchange(1, index, names).steps
        ipv6 = steps[0][1][0] >> 4 == 6
        header = 40 if ipv6 else 20
        ports = steps[0][1][header : header + 4]
        parts = [bytes((IPV6 if ipv6 else 0,))]
        for side, packet in steps:
            segment = packet[header:]
            if side:
                segment = segment[2:4] + segment[:2] + segment[4:]
            if segment[:4] != ports:
                continue
            payload = segment[8:] if packet[6 if ipv6 else 9] == IPPROTO_UDP else segment[segment[12] >> 4 << 2 :]
            if payload:
                parts.append(bytes((side,)) + len(payload).to_bytes(2, "big") + payload)
        found.append(b"".join(parts)[:4000])
    return found


def targets() -> dict[str, Callable[[bytes], None]]:
    """Each helper's function of bytes."""
    return {f"helper-{name}": partial(converse, helper, protonum, port) for name, helper, protonum, port, _ in TARGETS}
