"""The core against the live kernel for a minute, and that the harness would notice if they differed."""

import random
from contextlib import suppress

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6EchoRequest, IPv6
from scapy.layers.sctp import SCTP

from conntrackd import const
from tests.differential import packets
from tests.differential.__main__ import differ, explain, live_report, report
from tests.differential.compare import AmbiguousTimingError, Twin, replay
from tests.differential.generate import PROTOCOLS, generate
from tests.differential.generate.path import Conversation, Step, addresses
from tests.differential.kernel import CLIENT, SERVER, Router
from tests.differential.live import live
from tests.differential.packets import ACK, RST, SYN
from tests.differential.shrink import shrink

CLIENT4, SERVER4, _ = addresses(1, 4)
CLIENT6, SERVER6, _ = addresses(1, 6)
PORTS = (40000, 443)
KEY = b"\x06" + CLIENT4 + SERVER4 + PORTS[0].to_bytes(2, "big") + PORTS[1].to_bytes(2, "big")


def segment(side: int, flags: int, seq: int, ack: int = 0, payload: bytes = b"") -> Step:
    ends = (CLIENT4, SERVER4) if side == CLIENT else (SERVER4, CLIENT4)
    ports = PORTS if side == CLIENT else PORTS[::-1]
    return Step(side, 0, packets.ip(*ends, 6, packets.tcp(*ends, *ports, flags, seq, ack, 1000, b"", payload)))


HANDSHAKE = [
    segment(CLIENT, SYN, 1000),
    segment(SERVER, SYN | ACK, 5000, 1001),
    segment(CLIENT, ACK, 1001, 5001),
]


# --- the comparison ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seed", "seconds"),
    [(1, 12.0), (random.SystemRandom().randrange(1 << 32), 30.0)],
    ids=["fixed", "fresh"],
)
def test_the_core_agrees_with_the_kernel(seed: int, seconds: float) -> None:
    print(f"seed {seed}")
    tally = differ(seed, seconds=seconds)
    report(tally)
    explain(tally.mismatches, 3)
    assert not tally.mismatches
    assert not tally.strays
    # The generator gets everywhere: no agreement by saying nothing.
    assert len([name for name in tally.states if name.startswith("tcp ")]) == 9
    for protocol in PROTOCOLS:
        assert tally.reached[protocol] >= {"new", "established", "established_reply", "related_reply", "invalid"}
    assert {"related", "untracked"} <= tally.reached["icmp"]


def test_the_daemon_agrees_with_the_kernel() -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")
    outcome = live(seed, 15.0)
    assert live_report(outcome) == 0
    assert outcome.packets > 100


@pytest.mark.parametrize(
    ("protocol", "name", "value"),
    [
        ("tcp", "tcp_timeout_fin_wait", 117_000),
        ("tcp", "tcp_max_retrans", 4),
        ("tcp", "tcp_be_liberal", 1),
        ("tcp", "tcp_loose", 0),
        ("tcp", "tcp_ignore_invalid_rst", 1),
        ("udp", "udp_timeout", 28_000),
        ("icmp", "icmp_timeout", 33_000),
        ("sctp", "sctp_timeout_established", 205_000),
        ("gre", "gre_timeout_stream", 177_000),
        ("generic", "checksum", 0),
    ],
)
def test_the_harness_notices_a_core_that_is_set_otherwise(protocol: str, name: str, value: int) -> None:
    if protocol == "generic":
        protocol = "udplite"
    with Twin("default") as twin:
        assert getattr(twin.net.sysctl, name) != value
        for index in range(500):
            setattr(twin.net.sysctl, name, value)
            conversation = generate(7, index, (protocol,))
            for step in conversation.steps:
                step.delay_ms = 0
            with suppress(AmbiguousTimingError):
                if replay(twin, conversation) is not None:
                    return
            twin.empty()
    pytest.fail("500 conversations and nothing noticed")


def test_a_mismatch_is_shrunk_to_what_differs(monkeypatch: pytest.MonkeyPatch) -> None:
    begin = Twin._begin

    def begin_otherwise(twin: Twin) -> None:
        begin(twin)
        twin.net.sysctl.tcp_timeout_close = 13_000

    monkeypatch.setattr(Twin, "_begin", begin_otherwise)
    noise = [segment(CLIENT, ACK, 1001, 5001, bytes(size)) for size in range(5)]
    steps = [*HANDSHAKE, *noise, segment(SERVER, RST, 5001), *noise]
    conversation = Conversation(0, 0, "tcp", "default", steps, [KEY])
    with Twin("default") as twin:
        mismatch = replay(twin, conversation)
    assert mismatch is not None
    assert (mismatch.step, mismatch.about) == (len(HANDSHAKE) + len(noise), "timeout")
    shortest = shrink(mismatch)
    assert shortest is not None
    assert shortest.about == "timeout"
    assert shortest.conversation.steps[-1].data == segment(SERVER, RST, 5001).data
    assert len(shortest.conversation.steps) <= len(HANDSHAKE) + 1


# --- the oracle -------------------------------------------------------------------------------------------------


def test_the_kernel_is_read_after_every_packet() -> None:
    with Router.tracking({"tcp_timeout_syn_recv": 51}) as router:
        seen, timeouts = [], []
        for step in HANDSHAKE:
            passage = router.forward(step.side, step.data)
            assert passage.data == step.data
            assert passage.left
            entry = router.entry(KEY)
            assert entry is not None
            seen.append((passage.ctinfo, entry.state, entry.status & const.IPS_ASSURED))
            timeouts.append(entry.timeout)
        assert seen == [
            (const.IP_CT_NEW, 1, 0),
            (const.IP_CT_ESTABLISHED_REPLY, 2, 0),
            (const.IP_CT_ESTABLISHED, 3, const.IPS_ASSURED),
        ]
        # Whole seconds that are left: a tick later it is one less.
        assert timeouts == [pytest.approx(full, abs=2) for full in (120, 51, 432000)]
        assert list(router.entries()) == [KEY]
        router.flush()
        assert router.entry(KEY) is None


def test_packets_that_the_ip_stack_keeps_are_not_seen() -> None:
    datagram = packets.udp(CLIENT4, SERVER4, 1, 2, bytes(64))
    whole = packets.ip(CLIENT4, SERVER4, 17, datagram)
    first, second = packets.fragments(whole, [32], 9)
    with Router.tracking({}) as router:
        assert router.forward(CLIENT, packets.ipv4(CLIENT4, SERVER4, 17, datagram, bad=True)).data is None
        assert router.forward(CLIENT, first).data is None
        assembled = router.forward(CLIENT, second)
        assert assembled.data is not None
        assert assembled.data[20:] == datagram
        dying = router.forward(CLIENT, packets.ipv4(SERVER4, CLIENT4, 17, datagram, ttl=1))
        assert dying.data is not None
        assert not dying.left


def test_an_invalid_packet_passes_and_says_so() -> None:
    stray = segment(SERVER, SYN | ACK, 1, 1)
    with Router.tracking({}) as router:
        passage = router.forward(stray.side, stray.data)
        assert (passage.ctinfo, passage.left) == (const.INVALID, True)
        assert router.stats()["invalid"] == 1


# --- the generator ----------------------------------------------------------------------------------------------


def test_seed_and_index_are_the_whole_conversation() -> None:
    assert [generate(5, index) for index in range(200)] == [generate(5, index) for index in range(200)]
    assert generate(5, 0) != generate(6, 0)


@pytest.mark.parametrize(
    "scapy_ip", [IP(src="10.0.0.2", dst="10.128.0.2", flags="DF", id=0), None], ids=["ipv4", "ipv6"]
)
def test_packets_are_as_scapy_builds_them(scapy_ip: IP | None) -> None:
    if scapy_ip is not None:
        head, saddr, daddr = scapy_ip, CLIENT4, SERVER4
    else:
        saddr, daddr = CLIENT6, SERVER6
        head = IPv6(src="fd0a::2", dst="fd0b::2")
    payload = bytes(range(41))
    theirs = head / TCP(sport=7, dport=9, seq=1, ack=2, flags="SA", window=5) / payload
    assert packets.ip(saddr, daddr, 6, packets.tcp(saddr, daddr, 7, 9, SYN | ACK, 1, 2, 5, b"", payload)) == bytes(
        theirs
    )
    theirs = head / UDP(sport=7, dport=9) / payload
    assert packets.ip(saddr, daddr, 17, packets.udp(saddr, daddr, 7, 9, payload)) == bytes(theirs)
    theirs = head / SCTP(sport=7, dport=9, tag=3) / packets.chunk(6)
    assert packets.ip(saddr, daddr, 132, packets.sctp(7, 9, 3, [packets.chunk(6)])) == bytes(theirs)
    if scapy_ip is not None:
        ours = packets.icmp(8, 0, b"\0\1\0\2" + payload)
        assert packets.ip(saddr, daddr, 1, ours) == bytes(head / ICMP(id=1, seq=2) / payload)
    else:
        ours = packets.icmpv6(saddr, daddr, 128, 0, b"\0\1\0\2" + payload)
        assert packets.ip(saddr, daddr, 58, ours) == bytes(head / ICMPv6EchoRequest(id=1, seq=2, data=payload))


def test_every_packet_can_be_described() -> None:
    lines = [packets.describe(step.data) for index in range(300) for step in generate(8, index).steps]
    assert all(lines)
    assert (
        packets.describe(HANDSHAKE[1].data) == "10.128.0.2.443 > 10.0.0.2.40000 tcp SA seq 5000 ack 1001 win 1000 len 0"
    )
