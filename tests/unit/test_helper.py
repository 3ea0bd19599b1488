"""Who has a helper, what it is shown, and what comes of its verdict."""

import re
import struct
from pathlib import Path
from typing import Any

import pytest

from conntrackd.config import parse
from conntrackd.const import (
    DROP,
    IPPROTO_GRE,
    IPPROTO_TCP,
    IPPROTO_UDP,
    IPS_EXPECTED,
    IPS_HELPER,
    IPS_SEEN_REPLY,
    MARK_ESTABLISHED,
    MARK_NEW,
    MARK_UNCONFIRMED,
    NF_ACCEPT,
    NF_DROP,
    NF_INET_POST_ROUTING,
    NF_INET_PRE_ROUTING,
)
from conntrackd.core import helpers
from conntrackd.core.conn import Conn
from conntrackd.core.helper import Helper, Message, Policy, assign_helper
from conntrackd.core.helpers import HELPERS
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.core.table import zone_key
from conntrackd.core.tuples import get_tuple, invert
from conntrackd.hooks import Firewall, post_routing, pre_routing
from conntrackd.policy.compile import compile as compile_ruleset
from tests.differential.packets import ACK, PSH, SYN
from tests.unit.craft import SERVER, START_MS, ip, tcp, udp

POLICY = b"""
version = 1
[[rule]]
name = "helped"
protocol = ["tcp", "udp"]
port = 80
helper = "ftp"
action = "accept"
"""


class Listens(Helper):
    """Remembers what it is shown, and answers what it is told."""

    def __init__(self) -> None:
        super().__init__("ftp", (IPPROTO_TCP, IPPROTO_UDP), [Policy("", 1, 1000)])
        self.heard: list[tuple[bytes, int, int, bool]] = []
        self.verdict = NF_ACCEPT

    def help(self, net: Conntrack, ct: Conn, message: Message, now_ms: int) -> int:  # noqa: ARG002
        self.heard.append((message.payload, message.missing, message.seq, message.reply))
        return self.verdict


class Crossing:
    """A firewall whose rule assigns the helper that listens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.listens = Listens()
        monkeypatch.setitem(helpers.HELPERS, "ftp", self.listens)
        self.fw = Firewall(Conntrack(Sysctl()), compile_ruleset(parse(POLICY, "test.toml"), 1))

    def send(self, packet: bytes) -> int:
        mark = pre_routing(self.fw, packet, NF_INET_PRE_ROUTING, 1, START_MS)
        if mark != DROP and mark & MARK_UNCONFIRMED:
            mark = post_routing(self.fw, packet, mark, NF_INET_POST_ROUTING, 1, 2, START_MS)
        return mark

    def handshake(self) -> None:
        self.send(tcp(SYN, 100))
        self.send(tcp(SYN | ACK, 900, 101, back=True))
        self.send(tcp(ACK, 101, 901))


@pytest.fixture
def crossing(monkeypatch: pytest.MonkeyPatch) -> Crossing:
    return Crossing(monkeypatch)


def fresh(packet: bytes) -> Conn:
    key = get_tuple(packet, 0)
    return Conn(key, invert(key), key[0], START_MS)


def helper_of(ct: Conn) -> Helper | None:
    return ct.help.helper if ct.help is not None else None


def test_a_helper_is_for_its_protocols_and_families() -> None:
    ct = fresh(tcp(SYN))
    assign_helper(ct, HELPERS["tftp"])
    assert helper_of(ct) is None
    assign_helper(ct, HELPERS["ftp"])
    assert helper_of(ct) is HELPERS["ftp"]
    assert ct.status & IPS_HELPER
    assign_helper(ct, HELPERS["sane"])
    assert helper_of(ct) is HELPERS["ftp"]
    for name, expected in (("irc", False), ("ftp", True)):
        ct = fresh(tcp(SYN, family=6))
        assign_helper(ct, HELPERS[name])
        assert (ct.help is not None) is expected


def test_an_expected_connection_has_the_helper_of_its_expectation_or_none() -> None:
    ct = fresh(tcp(SYN))
    ct.status |= IPS_EXPECTED
    assign_helper(ct, HELPERS["ftp"])
    assert ct.help is None


def test_every_helper_has_the_name_it_is_found_by() -> None:
    assert all(helper.name == name for name, helper in HELPERS.items())
    assert set(HELPERS) == {"amanda", "ftp", "irc", "netbios-ns", "pptp", "sane", "sip", "snmp", "tftp"}


def test_tcp_is_shown_after_the_handshake_and_with_payload(crossing: Crossing) -> None:
    crossing.handshake()
    assert crossing.listens.heard == []
    crossing.send(tcp(ACK | PSH, 101, 901, data=b"question"))
    crossing.send(tcp(ACK | PSH, 901, 109, data=b"answer", back=True))
    crossing.send(tcp(ACK, 109, 907))
    assert crossing.listens.heard == [(b"question", 0, 101, False), (b"answer", 0, 901, True)]


def test_udp_is_shown_from_the_first_packet_on(crossing: Crossing) -> None:
    assert crossing.send(udp(b"one")) == MARK_NEW
    crossing.send(udp(b"two", back=True))
    crossing.send(udp())
    assert crossing.listens.heard == [(b"one", 0, 0, False), (b"two", 0, 0, True), (b"", 0, 0, False)]


def test_a_cut_packet_says_what_is_missing(crossing: Crossing) -> None:
    crossing.send(udp(b"x" * 1000)[:100])
    assert crossing.listens.heard == [(b"x" * 72, 928, 0, False)]


def test_the_second_packet_of_a_flow_on_its_way_is_shown_too(crossing: Crossing) -> None:
    fw = crossing.fw
    marks = [pre_routing(fw, udp(data), NF_INET_PRE_ROUTING, 1, START_MS) for data in (b"one", b"two")]
    for mark, data in zip(marks, (b"one", b"two"), strict=True):
        assert post_routing(fw, udp(data), mark, NF_INET_POST_ROUTING, 1, 2, START_MS) == MARK_NEW
    assert [heard[0] for heard in crossing.listens.heard] == [b"one", b"two"]


def test_what_a_helper_drops_is_counted_and_leaves_no_connection(crossing: Crossing) -> None:
    crossing.listens.verdict = NF_DROP
    assert crossing.send(udp(b"one")) == DROP
    assert crossing.fw.net.table.count == 0
    crossing.handshake()
    assert crossing.send(tcp(ACK | PSH, 101, 901, data=b"question")) == DROP
    assert crossing.fw.drop_counts == {"helper": 2}
    crossing.listens.verdict = NF_ACCEPT
    assert crossing.send(tcp(ACK | PSH, 101, 901, data=b"question")) == MARK_ESTABLISHED


def test_the_example_of_the_guide_works() -> None:
    guide = Path(__file__).parents[2] / "docs" / "helpers.md"
    _, example, _ = re.split(r"^```(?:python)?\n", guide.read_text().split("## Writing one")[1], maxsplit=2, flags=re.M)
    namespace: dict[str, Any] = {}
    exec(example, namespace)  # noqa: S102 - our own documentation
    net = Conntrack(Sysctl())
    key = get_tuple(tcp(SYN, dport=7000), 0)
    ct = Conn(key, invert(key), IPPROTO_TCP, START_MS)
    assign_helper(ct, namespace["Parcel"]())
    net.table.insert(ct, START_MS)
    assert ct.help is not None
    for answer, expected in ((b"PORT 80", 0), (b"PORT x", 0), (b"PORT 1025", 1)):
        assert ct.help.helper.help(net, ct, Message(answer, 0, 0, True), START_MS) == NF_ACCEPT
        assert len(ct.help.expectations) == expected


# --- PPTP -----------------------------------------------------------------------------------------------------------


def pptp(kind: int, body: bytes, seq: int, ack: int, back: bool = False) -> bytes:
    message = struct.pack(">HHIHH", 12 + len(body), 1, 0x1A2B3C4D, kind, 0) + body
    return tcp(ACK | PSH, seq, ack, data=message, back=back)


def pptp_session(pns: int, pac: int) -> list[bytes]:
    """A control connection on which one call is agreed on."""
    start = struct.pack(">HBBIIHH", 0x100, 1, 0, 1, 1, 0, 1) + bytes(128)
    request = struct.pack(">HHIIIIHHHH", pns, 1, 300, 10**6, 3, 3, 64, 0, 0, 0) + bytes(128)
    reply = struct.pack(">HHBBHIHHI", pac, pns, 1, 0, 0, 10**6, 64, 0, 0)
    first, second = 101 + 12 + len(start), 901 + 12 + len(start)
    return [
        tcp(SYN, 100),
        tcp(SYN | ACK, 900, 101, back=True),
        pptp(1, start, 101, 901),
        pptp(2, start, 901, first, back=True),
        pptp(7, request, first, second),
        pptp(8, reply, second, first + 12 + len(request), back=True),
    ]


def of_call(call_id: int, back: bool = False) -> bytes:
    """A GRE packet of a call: it names the id of its receiver only."""
    return ip(47, struct.pack(">HHHH", 0x2001, 0x880B, 4, call_id) + b"data", back=back)


def test_twin_calls_in_two_zones_are_two_connections() -> None:
    """The same addresses; the server gave both calls the same id, and the clients did not."""
    text = POLICY.replace(b'["tcp", "udp"]', b'"tcp"').replace(b'"ftp"', b'"pptp"')
    fw = Firewall(Conntrack(Sysctl()), compile_ruleset(parse(text, "test.toml"), 1))
    fw.net.zones = {1: 5, 2: 5, 3: 6, 4: 6}

    def cross(packet: bytes, iif: int, oif: int) -> None:
        mark = pre_routing(fw, packet, NF_INET_PRE_ROUTING, iif, START_MS)
        if mark != DROP and mark & MARK_UNCONFIRMED:
            mark = post_routing(fw, packet, mark, NF_INET_POST_ROUTING, iif, oif, START_MS)
        assert mark != DROP

    def calls() -> dict[tuple[int, bytes], bool]:
        """The calls by zone and ids, and whether they were answered."""
        return {
            (ct.zone, ct.orig[-4:]): ct.status & IPS_SEEN_REPLY != 0
            for ct in fw.net.table.connections()
            if ct.protonum == IPPROTO_GRE
        }

    for iif, oif, pns in (1, 2, 0x1111), (3, 4, 0x3333):
        for packet in pptp_session(pns, 0x2222):
            back = packet[12:16] == SERVER[4]
            cross(packet, oif if back else iif, iif if back else oif)
    for iif, oif in (1, 2), (3, 4):
        cross(of_call(0x2222), iif, oif)
    assert calls() == {(5, bytes.fromhex("11112222")): False, (6, bytes.fromhex("33332222")): False}
    cross(of_call(0x1111, back=True), 2, 1)
    cross(of_call(0x3333, back=True), 4, 3)
    assert calls() == {(5, bytes.fromhex("11112222")): True, (6, bytes.fromhex("33332222")): True}
    # One session ends with its call; the other call goes on.
    (control,) = [ct for ct in fw.net.table.connections() if ct.zone == 5 and ct.protonum == IPPROTO_TCP]
    fw.net.table.kill(control, START_MS)
    assert calls() == {(6, bytes.fromhex("33332222")): True}
    assert set(fw.net.table.gre_keymap) == {
        zone_key(6, get_tuple(of_call(0x2222), 0)), zone_key(6, get_tuple(of_call(0x3333, back=True), 0)),
    }  # fmt: skip
