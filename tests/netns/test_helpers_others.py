"""TFTP and SIP by real programs, the rest by minimal ones: each passes with its helper and is blocked without."""

import os
import shutil
import socket
import struct
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab.daemon import Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.programs import tftp_server
from tests.lab.traffic import Arrivals, inject, tcp_listener, tcp_pair, udp_socket

CONFIG = """\
version = 1

[zones.lan]
interfaces = ["lan"]

[zones.wan]
interfaces = ["wan"]

[[rule]]
name = "helped"
from = "{source}"
to = "{target}"
protocol = "{protocol}"
port = {port}
{helper}
action = "accept"
"""


def policy(protocol: str, port: int, helper: str, source: str = "lan", target: str = "wan") -> str:
    """Allow one port; with a helper unless its name is empty."""
    line = f'helper = "{helper}"' if helper else ""
    return CONFIG.format(source=source, target=target, protocol=protocol, port=port, helper=line)


@pytest.fixture
def public() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(prefix="conntrackd-helpers-"))
    yield directory
    shutil.rmtree(directory)


def child_of(fw: Daemon, protocol: str, **orig: object) -> dict[str, Any]:
    """The connection with this original direction, which must be an expected one of the only other connection."""
    child = fw.flow(protocol, **orig)
    assert "EXPECTED" in child["status"]
    assert child["master"] in [flow["id"] for flow in fw.flows() if flow["helper"] is not None]
    return child


# --- TFTP -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("helper", ["tftp", ""])
def test_tftp(net: Network, public: Path, family: int, helper: str, tmp_path: Path) -> None:
    (public / "file").write_bytes(os.urandom(200_000))
    tftp_server(net.server, public, family)
    address = f"[{net.server.ipv6}]" if family == 6 else net.server.ipv4
    get = ["curl", "--silent", "--show-error", "--max-time", "60" if helper else "4"]
    with daemon(net.router, policy("udp", 69, helper)) as fw:
        done = net.client.run(*get, "--output", tmp_path / "got", f"tftp://{address}/file", check=False)
        if not helper:
            assert done.returncode != 0
            assert fw.wait_for_drop(reason="policy", protocol="udp")["src"] == net.server.address(family)
            return
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "got").read_bytes() == (public / "file").read_bytes()
        child_of(fw, "udp", src=net.server.address(family))
        # And a file to the server.
        (tmp_path / "sent").write_bytes(b"x" * 5000)
        net.client.run(*get, "--upload-file", tmp_path / "sent", f"tftp://{address}/sent")
        assert (public / "sent").read_bytes() == b"x" * 5000


# --- SIP --------------------------------------------------------------------------------------------------------

CALL = """<?xml version="1.0" encoding="ISO-8859-1" ?>
<scenario name="a call with voice">
  <send retrans="500"><![CDATA[
INVITE sip:service@[remote_ip]:[remote_port] SIP/2.0
Via: SIP/2.0/[transport] [local_ip]:[local_port];branch=[branch]
From: <sip:caller@[local_ip]:[local_port]>;tag=[call_number]
To: <sip:service@[remote_ip]:[remote_port]>
Call-ID: [call_id]
CSeq: 1 INVITE
Contact: sip:caller@[local_ip]:[local_port]
Max-Forwards: 70
Content-Type: application/sdp
Content-Length: [len]

v=0
o=caller 1 1 IN IP[local_ip_type] [local_ip]
s=-
c=IN IP[media_ip_type] [media_ip]
t=0 0
m=audio [media_port] RTP/AVP 0
a=rtpmap:0 PCMU/8000
]]></send>
  <recv response="100" optional="true" />
  <recv response="180" optional="true" />
  <recv response="200" />
  <send><![CDATA[
ACK sip:service@[remote_ip]:[remote_port] SIP/2.0
Via: SIP/2.0/[transport] [local_ip]:[local_port];branch=[branch]
From: <sip:caller@[local_ip]:[local_port]>;tag=[call_number]
To: <sip:service@[remote_ip]:[remote_port]>[peer_tag_param]
Call-ID: [call_id]
CSeq: 1 ACK
Content-Length: 0

]]></send>
  <nop><action><exec rtp_stream="{voice},-1,0" /></action></nop>
  <pause milliseconds="{pause}" />
  <send retrans="500"><![CDATA[
BYE sip:service@[remote_ip]:[remote_port] SIP/2.0
Via: SIP/2.0/[transport] [local_ip]:[local_port];branch=[branch]
From: <sip:caller@[local_ip]:[local_port]>;tag=[call_number]
To: <sip:service@[remote_ip]:[remote_port]>[peer_tag_param]
Call-ID: [call_id]
CSeq: 2 BYE
Content-Length: 0

]]></send>
  <recv response="200" />
</scenario>
"""


@pytest.mark.parametrize("transport", ["udp", "tcp"])
@pytest.mark.parametrize("helper", ["sip", ""])
def test_sip_call_with_voice(net: Network, public: Path, transport: str, helper: str) -> None:
    """sipp calls sipp; RTP goes from the caller to where the other one says, and is echoed."""
    (public / "voice.ul").write_bytes(b"\xd5\x55" * 40_000)
    (public / "call.xml").write_text(CALL.format(voice=public / "voice.ul", pause=1500))
    mode = "t1" if transport == "tcp" else "u1"
    common = ["-p", "5060", "-t", mode, "-nostdin", "-m", "1"]
    env = {"TERM": "dumb"}
    with daemon(net.router, policy(transport, 5060, helper)) as fw:
        # Where it listens for calls it also echoes voice.
        answers = ["sipp", "-sn", "uas", "-i", net.server.ipv4, "-mp", "7000", "-rtp_echo", *common]
        answerer = net.server.start(*answers, env=env)
        wait_until(
            lambda: ":13C4 " in net.server.read(f"net/{transport}") or ":13C4 " in net.server.read(f"net/{transport}6"),
            "sipp listens",
        )
        arrivals = Arrivals(net.client)
        call = ["sipp", "-sf", public / "call.xml", "-i", net.client.ipv4, "-mp", "6000", *common, net.server.ipv4]
        done = net.client.run(*map(str, call), env=env, check=False)
        assert done.returncode == 0, done.stdout + done.stderr + answerer.output()
        flow = fw.flow(transport, dport=5060)
        assert flow["helper"] == (helper or None)
        echoed = [packet for packet in arrivals.packets() if packet[9] == 17 and packet[20:24] == b"\x1b\x58\x17\x70"]
        if helper:
            voice = child_of(fw, "udp", dport=7000)
            assert voice["reply"]["packets"] > 10
            assert len(echoed) > 10
        else:
            fw.wait_for_drop(reason="policy", dport=7000)
            assert echoed == []


# --- PPTP -------------------------------------------------------------------------------------------------------


def pptp_message(kind: int, body: bytes) -> bytes:
    return struct.pack(">HHIHH", 12 + len(body), 1, 0x1A2B3C4D, kind, 0) + body


def gre(source: str, target: str, call_id: int, content: bytes) -> bytes:
    """A packet of a call (RFC 2637 4.1)."""
    payload = struct.pack(">HHHH", 0x2001, 0x880B, len(content), call_id) + content
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0, 64, 47, 0)
    return head + socket.inet_aton(source) + socket.inet_aton(target) + payload


@pytest.mark.parametrize("helper", ["pptp", ""])
def test_pptp_call(net: Network, helper: str) -> None:
    pns, pac = 0x1111, 0x2222
    out_request = struct.pack(">HHIIIIHHHH", pns, 1, 300, 10**6, 3, 3, 64, 0, 0, 0) + bytes(128)
    out_reply = struct.pack(">HHBBHIHHI", pac, pns, 1, 0, 0, 10**6, 64, 0, 0)
    with daemon(net.router, policy("tcp", 1723, helper)) as fw:
        near, far = tcp_pair(net.client, net.server, 4, 1723)
        for sender, receiver, kind, body in (
            (near, far, 1, struct.pack(">HBBIIHH", 0x100, 0, 0, 1, 1, 0, 1) + bytes(128)),
            (far, near, 2, struct.pack(">HBBIIHH", 0x100, 1, 0, 1, 1, 0, 1) + bytes(128)),
            (near, far, 7, out_request),
            (far, near, 8, out_reply),
        ):
            sender.sendall(pptp_message(kind, body))
            receiver.recv(1000)
        at_server, at_client = Arrivals(net.server), Arrivals(net.client)
        outward = gre(net.client.ipv4, net.server.ipv4, pac, b"outward")
        inward = gre(net.server.ipv4, net.client.ipv4, pns, b"inward")
        inject(net.client, [outward])
        if not helper:
            fw.wait_for_drop(reason="policy", protocol="gre")
            inject(net.server, [inward])
            wait_until(lambda: len([d for d in fw.drops() if d["protocol"] == "gre"]) == 2, "both are dropped")
            assert not at_server.having(b"outward")
            assert not at_client.having(b"inward")
            return
        at_server.wait_for(b"outward")
        inject(net.server, [inward])
        at_client.wait_for(b"inward")
        # One connection with the ids of both sides, and no expectation is left.
        call = child_of(fw, "gre", srckey=pns, dstkey=pac)
        assert "SEEN_REPLY" in call["status"]
        assert fw.json("flows", "--expected") == []
        # The call ends with its session.
        far.sendall(pptp_message(13, struct.pack(">HBBHH", pac, 4, 0, 0, 0) + bytes(128)))
        near.recv(1000)
        assert [flow for flow in fw.flows() if flow["protocol"] == "gre"] == []


# --- Broadcasts of the router -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "port"), [("netbios-ns", 137), ("snmp", 161)])
@pytest.mark.parametrize("helped", [True, False])
def test_answers_to_a_broadcast(net: Network, name: str, port: int, helped: bool) -> None:
    for host, address, interface in (net.router, "10.9.0.1", "lan"), (net.client, "10.9.0.2", "eth0"):
        host.run("ip", "address", "add", f"{address}/24", "brd", "+", "dev", interface)
    with daemon(net.router, policy("udp", port, name if helped else "", "self", "lan")) as fw:
        asker = udp_socket(net.router, 4, 0, "10.9.0.1")
        asker.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        hears = udp_socket(net.client, 4, port, "10.9.0.255")
        answers = udp_socket(net.client, 4, port, "10.9.0.2")
        asker.sendto(b"who is there", ("10.9.0.255", port))
        question, sender = hears.recvfrom(100)
        assert question == b"who is there"
        answers.sendto(b"me", sender)
        if not helped:
            assert fw.wait_for_drop(reason="policy", protocol="udp")["src"] == "10.9.0.2"
            return
        assert asker.recv(100) == b"me"
        child_of(fw, "udp", src="10.9.0.2", sport=port)
        # Anyone of the network may answer as long as it is expected, which another question renews.

        def expectations() -> list[dict[str, Any]]:
            asker.sendto(b"who is there", ("10.9.0.255", port))
            found: list[dict[str, Any]] = fw.json("flows", "--expected")
            return found

        (expected,) = wait_until(expectations, "answers are expected")
        assert (expected["src"], expected["sport"], expected["flags"]) == ("10.9.0.0/24", port, ["PERMANENT"])


# --- The others over TCP and UDP, by minimal programs -----------------------------------------------------------


def irc(net: Network, port: int) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 6667)
    number = int.from_bytes(socket.inet_aton(net.client.ipv4), "big")
    near.sendall(f"PRIVMSG friend :\1DCC SEND file {number} {port}\1\r\n".encode())
    far.recv(1000)


def sane(net: Network, port: int) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 6566)
    near.sendall(struct.pack(">II", 7, 1))
    far.recv(1000)
    far.sendall(struct.pack(">IHHI", 0, 0, port, 0x1234))
    near.recv(1000)


def amanda(net: Network, port: int) -> None:
    near, far = udp_socket(net.client, 4), udp_socket(net.server, 4, 10080)
    near.sendto(b"Amanda 2.6 REQ HANDLE 000-1 SEQ 1\nSERVICE sendbackup\n", far.getsockname())
    _, sender = far.recvfrom(1000)
    far.sendto(f"Amanda 2.6 REP HANDLE 000-1 SEQ 1\nCONNECT DATA {port} MESG 2 INDEX 3\n".encode(), sender)
    near.recv(1000)


@pytest.mark.parametrize(
    ("name", "protocol", "control", "announce", "from_server"),
    [
        ("irc", "tcp", 6667, irc, True),
        ("sane", "tcp", 6566, sane, False),
        ("amanda", "udp", 10080, amanda, False),
    ],
)
@pytest.mark.parametrize("helped", [True, False])
def test_announced_stream(
    net: Network, name: str, protocol: str, control: int, announce: Callable[[Network, int], None],
    from_server: bool, helped: bool,
) -> None:  # fmt: skip
    opener, listener = (net.server, net.client) if from_server else (net.client, net.server)
    with daemon(net.router, policy(protocol, control, name if helped else "")) as fw:
        announce(net, 5000)
        tcp_listener(listener, 4, 5000)
        stream = opener.open_socket(socket.AF_INET, socket.SOCK_STREAM)
        if helped:
            stream.connect((listener.ipv4, 5000))
            child_of(fw, "tcp", dport=5000)
            return
        stream.settimeout(1.0)
        with pytest.raises(TimeoutError):
            stream.connect((listener.ipv4, 5000))
        fw.wait_for_drop(reason="policy", dport=5000)
