"""The kernel's helpers expect what ours expect, and classify what follows alike."""

import random
import socket
import struct
import subprocess
import time
from collections.abc import Iterator

import pytest

from conntrackd import config, const
from conntrackd.core.conntrack import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.hooks import Firewall, post_routing, pre_routing
from conntrackd.policy.compile import compile  # noqa: A004
from tests.differential import kernel, packets
from tests.differential.generate.helpers import SCENES, Scene, Tcp, pptp_message
from tests.differential.generate.path import addresses
from tests.differential.helping import HelpingRouter, HelpingTwin, compare, ours

SEED = 20

ASKER = bytes((10, 9, 0, 1))
BROADCAST = bytes((10, 9, 0, 255))
MASK = bytes((255, 255, 255, 0))
NOW_MS = 10_000_000

BROADCAST_RULES = """
table inet helping {
  ct helper netbios { type "netbios-ns" protocol udp; l3proto ip; }
  ct helper snmp { type "snmp" protocol udp; l3proto ip; }
  chain out {
    type filter hook output priority 0;
    udp dport 137 ct helper set "netbios"
    udp dport 161 ct helper set "snmp"
  }
}
"""
BROADCAST_POLICY = b"""
version = 1
[[rule]]
name = "netbios"
protocol = "udp"
port = 137
helper = "netbios-ns"
action = "accept"
[[rule]]
name = "snmp"
protocol = "udp"
port = 161
helper = "snmp"
action = "accept"
"""


@pytest.mark.parametrize("name", sorted(SCENES))
def test_same_expectations_as_the_kernel(name: str) -> None:
    tally, differences = compare(SEED, 100, (name,))
    assert not differences, differences[0]
    assert tally.expectations > 5
    assert tally.related > 5


@pytest.fixture
def asking() -> Iterator[tuple[HelpingRouter, socket.socket]]:
    """A router with an address in a network, and a socket of its own that may ask everybody there."""
    with kernel.namespace():
        router = HelpingRouter(BROADCAST_RULES, {})
        command = ["ip", "address", "add", "10.9.0.1/24", "brd", "+", "dev", kernel.DEVICES[kernel.CLIENT]]
        subprocess.run(command, check=True)
        asker = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    asker.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    asker.bind(("10.9.0.1", 0))
    with router, asker:
        yield router, asker


@pytest.mark.parametrize("port", [137, 161])
def test_broadcasts(asking: tuple[HelpingRouter, socket.socket], port: int) -> None:
    router, asker = asking
    asker.sendto(b"question", ("10.9.0.255", port))
    theirs = router.expectations()
    assert len(theirs) == 1

    net = Conntrack(Sysctl())
    net.broadcasts[BROADCAST] = MASK
    fw = Firewall(net, compile(config.parse(BROADCAST_POLICY, "broadcast.toml"), 1))
    datagram = packets.udp(ASKER, BROADCAST, asker.getsockname()[1], port, b"question")
    packet = packets.ip(ASKER, BROADCAST, const.IPPROTO_UDP, datagram)
    mark = pre_routing(fw, packet, const.NF_INET_LOCAL_OUT, 0, NOW_MS)
    assert post_routing(fw, packet, mark, const.NF_INET_POST_ROUTING, 0, 2, NOW_MS) == const.MARK_NEW
    mine = {expect.tuple: ours(expect, NOW_MS) for expect in net.table.expectations.by_id.values()}
    assert mine.keys() == theirs.keys()
    for key, expected in theirs.items():
        assert mine[key][:-1] == expected[:-1]
        assert abs(mine[key].timeout - expected.timeout) <= 1
        # The query's own entry lives as long as its answers may come.
        entry = router.entry(expected.master)
        ct = net.table.find(expected.master, NOW_MS)
        assert entry is not None
        assert ct is not None
        assert abs(entry.timeout - (ct.expires_ms - NOW_MS) // 1000) <= 1


NUMBERS = ("7000", "05060", "005060", "00000007000", "000000007000", "8000000", "4294967296", "18446744073709558616")
CONTACT = "Expires: {expires}\r\nContact: <sip:u@{ip}:{port}>{tail}\r\n\r\n"
REGISTER = "REGISTER sip:x SIP/2.0\r\nCSeq: {cseq} REGISTER\r\n" + CONTACT
REGISTERED = "SIP/2.0 {code} OK\r\nCSeq: 7 REGISTER\r\n" + CONTACT
INVITE = "INVITE sip:x SIP/2.0\r\nCSeq: 7 INVITE\r\n\r\nv=0\r\nc=IN IP4 {ip}\r\nm=audio {port} RTP/AVP 0\r\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_long_numbers_of_sip(number: str) -> None:
    """Zeros in front, and what is more than 32 bits; a registration may be for longer than its connection lives."""
    usual = {"cseq": "7", "expires": "60", "port": "6000", "tail": "", "code": "200"}
    with HelpingTwin() as twin:
        for index, (name, value) in enumerate(
            (("cseq", number), ("expires", number), ("port", number), ("tail", f";expires={number}"), ("code", number))
        ):
            scene = Scene(random.Random(1), index, 4)
            said = usual | {name: value, "ip": scene.text(kernel.CLIENT)}
            texts = (REGISTER, REGISTERED) if name != "port" else (REGISTER, REGISTERED, INVITE)
            for text in texts:
                side = kernel.SERVER if text is REGISTERED else kernel.CLIENT
                scene.udp(side, 5060, 5060, text.format(**said).encode())
            scene.udp(kernel.CLIENT, 5060, 5060, REGISTER.format(**said).rstrip("\r\n").rstrip(">").encode())
            for side, packet in scene.steps:
                assert not twin.forward(side, packet)[0], (name, packet)


# --- Wanted differences (docs/differences.md) ---------------------------------------------------------------------


def test_an_announcement_that_does_not_leave_is_expected() -> None:
    """The kernel's helpers run at the last hook, which this packet never reaches; ours at the first."""
    client, server, _ = addresses(1, 4)
    scene = Scene(random.Random(1), 1, 4)
    control = Tcp(scene, 21)
    for side, line in (
        (kernel.SERVER, b"220 ready\r\n"),
        (kernel.CLIENT, b"USER anonymous\r\n"),
        (kernel.CLIENT, b"PORT " + b",".join(str(byte).encode() for byte in client) + b",20,1\r\n"),
    ):
        control.say(side, line)
    steps = scene.steps
    side, last = steps[-1]
    dying = packets.ip(client, server, const.IPPROTO_TCP, last[20:], ttl=1)
    with HelpingTwin() as twin:
        for each, packet in steps[:-1]:
            assert not twin.forward(each, packet)[0]
        passage = twin.router.forward(side, dying)
        assert (passage.ctinfo, passage.left) == (const.IP_CT_ESTABLISHED, False)
        assert not twin.router.expectations()
        assert passage.data is not None
        assert twin.cross_hooks(passage.data, side, time.monotonic_ns() // 1_000_000) >= 0
        assert len(twin.net.table.expectations.by_id) == 1


def test_pptp_calls_live_longer() -> None:
    """The kernel gives them the timeouts of any GRE flow, for it sets those of the call too early."""
    scene = Scene(random.Random(2), 2, 4)
    control = Tcp(scene, 1723)
    for side, kind, body in (
        (kernel.CLIENT, 1, struct.pack(">HBBIIHH", 0x100, 0, 0, 1, 1, 0, 1) + bytes(128)),
        (kernel.SERVER, 2, struct.pack(">HBBIIHH", 0x100, 1, 0, 1, 1, 0, 1) + bytes(128)),
        (kernel.CLIENT, 7, struct.pack(">HHIIIIHHHH", 1, 1, 300, 10**6, 3, 3, 64, 0, 0, 0) + bytes(128)),
        (kernel.SERVER, 8, struct.pack(">HHBBHIHHI", 2, 1, 1, 0, 0, 10**6, 64, 0, 0)),
    ):
        control.say(side, pptp_message(kind, body))
    scene.gre(kernel.CLIENT, 2)
    with HelpingTwin() as twin:
        for side, packet in scene.steps:
            assert not twin.forward(side, packet)[0]
        (call,) = [ct for ct in twin.net.table.connections() if ct.protonum == const.IPPROTO_GRE]
        entry = twin.router.entry(call.orig)
        assert entry is not None
        now = time.monotonic_ns() // 1_000_000
        assert 25 < entry.timeout <= 30
        assert 590_000 < call.expires_ms - now <= 600_000


def test_what_stands_behind_the_capture_is_not_read() -> None:
    """A REGISTER of more than 3900 bytes whose contact comes last."""
    client, server, _ = addresses(3, 4)
    head = b"REGISTER sip:x SIP/2.0\r\nCSeq: 1 REGISTER\r\nExpires: 60\r\nX-Filler: " + b"x" * 4000 + b"\r\n"
    text = head + b"Contact: <sip:user@" + ".".join(map(str, client)).encode() + b":6000>\r\n\r\n"
    packet = packets.ip(client, server, const.IPPROTO_UDP, packets.udp(client, server, 5060, 5060, text))
    with HelpingTwin() as twin:
        twin.forward(kernel.CLIENT, packet)
        assert len(twin.router.expectations()) == 1
        assert not twin.net.table.expectations.by_id
