"""The life of connections on real packets: limits, zones, timeouts, and events that say the same as the counters."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from scapy.layers.inet import IP, UDP

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, Process, wait_until
from tests.lab.traffic import inject, talk, tcp_pair, udp_socket

LIMITED = POLICY + "\n[conntrack]\nmax_per_source = 3\n"
SHORT = POLICY + '\n[conntrack]\nudp_timeout = "1s"\ntcp_timeout_time_wait = "1s"\ntcp_timeout_close = "1s"\n'
ZONED = POLICY + "\n[conntrack]\nzone_mark_mask = 0xff00\n"
NOTRACK = (
    POLICY.replace(
        "[[rule]]", '[[rule]]\nname = "ntp"\nprotocol = "udp"\nport = 123\naction = "notrack"\n\n[[rule]]', 1
    )
    + '\n[[rule]]\nname = "ntp-back"\nfrom = "wan"\nprotocol = "udp"\naction = "notrack"\n'
)


class Events:
    """`conntrackd events -o json`, from when the daemon knows of it."""

    def __init__(self, fw: Daemon) -> None:
        self.fw = fw
        self.process: Process = fw.router.start(*fw.command("events", "-o", "json"))
        wait_until(lambda: fw.stats()["listeners"] == 1, "the daemon has a listener")
        self.before = fw.stats()

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.process.output().splitlines(keepends=True) if line.endswith("\n")]

    def kinds(self) -> Counter[str]:
        return Counter(row["type"] for row in self.rows())

    def of(self, dport: int) -> list[dict[str, Any]]:
        return [row for row in self.rows() if row["flow"]["orig"].get("dport") == dport]

    def wait_for(self, dport: int, kind: str) -> list[dict[str, Any]]:
        wait_until(lambda: kind in [row["type"] for row in self.of(dport)], f"{kind} of port {dport}")
        return self.of(dport)


@contextmanager
def events(fw: Daemon) -> Iterator[Events]:
    made = Events(fw)
    try:
        yield made
    finally:
        made.process.stop()


@pytest.fixture
def config(request: pytest.FixtureRequest) -> str:
    """The daemon's configuration, by parametrization."""
    text: str = request.param
    return text


@pytest.fixture
def fw(net: Network, config: str) -> Iterator[Daemon]:
    with daemon(net.router, config) as running:
        yield running


def udp_flows(fw: Daemon, **orig: Any) -> list[dict[str, Any]]:
    return [flow for flow in fw.flows() if flow["protocol"] == "udp" and orig.items() <= flow["orig"].items()]


@pytest.mark.parametrize("config", [LIMITED], indirect=True)
def test_one_connection_more_than_its_source_may_have_is_refused_and_counted(
    net: Network, fw: Daemon, family: int
) -> None:
    far = [udp_socket(net.server, family, 7000 + number) for number in range(4)]
    near = udp_socket(net.client, family, 6000)
    for number in range(3):
        near.sendto(b"x", (net.server.address(family), 7000 + number))
        assert far[number].recv(10) == b"x"
    near.sendto(b"x", (net.server.address(family), 7003))
    drop = fw.wait_for_drop(reason="source_full", dport=7003)
    assert drop["src"] == net.client.address(family)
    assert len(udp_flows(fw)) == 3
    assert (fw.stats()["source_full"], fw.stats()["drop"]) == (1, 1)
    # Answers, and packets of the three, are not new.
    far[0].sendto(b"y", (net.client.address(family), 6000))
    assert near.recv(10) == b"y"
    near.sendto(b"z", (net.server.address(family), 7002))
    assert far[2].recv(10) == b"z"


@pytest.mark.parametrize("config", [ZONED], indirect=True)
def test_twins_in_two_zones_are_two_connections(net: Network, fw: Daemon) -> None:
    """The zone stands in the mark, put there by a rule of the router's own before ours."""
    net.router.run("iptables-legacy", "-t", "raw", "-I", "PREROUTING", "-m", "ttl", "--ttl-eq", "40",
                   "-j", "MARK", "--set-mark", "0x500")  # fmt: skip
    far = udp_socket(net.server, 4, 7000)
    far.settimeout(10.0)
    packet = IP(src=net.client.address(4), dst=net.server.address(4)) / UDP(sport=6000, dport=7000) / b"twin"
    for ttl, times in (64, 1), (40, 2):
        packet.ttl = ttl
        inject(net.client, [bytes(packet)] * times)
        for _ in range(times):
            assert far.recv(10) == b"twin"
    far.sendto(b"answer", (net.client.address(4), 6000))  # comes without a mark: zone 0

    def answered() -> bool:
        return any("SEEN_REPLY" in flow["status"] for flow in udp_flows(fw))

    wait_until(answered, "the answer has come")
    zones = {flow["zone"]: flow for flow in udp_flows(fw, sport=6000, dport=7000)}
    assert sorted(zones) == [0, 5]
    assert (zones[0]["orig"]["packets"], zones[5]["orig"]["packets"]) == (1, 2)
    assert "SEEN_REPLY" in zones[0]["status"]
    assert "SEEN_REPLY" not in zones[5]["status"]


@pytest.mark.parametrize("config", [NOTRACK], indirect=True)
def test_what_is_not_to_be_tracked_passes_without_a_connection(net: Network, fw: Daemon, family: int) -> None:
    far, near = udp_socket(net.server, family, 123), udp_socket(net.client, family, 6000)
    near.sendto(b"what time", (net.server.address(family), 123))
    assert far.recv(20) == b"what time"
    far.sendto(b"late", (net.client.address(family), 6000))
    assert near.recv(20) == b"late"
    assert not udp_flows(fw)
    assert fw.stats()["insert"] == 0


@pytest.mark.parametrize("config", [SHORT], indirect=True)
def test_a_connection_is_gone_at_its_timeout(net: Network, fw: Daemon, family: int) -> None:
    far, near = udp_socket(net.server, family, 7000), udp_socket(net.client, family, 6000)
    with events(fw) as heard:
        near.sendto(b"x", (net.server.address(family), 7000))
        assert far.recv(10) == b"x"
        new, *_, destroy = heard.wait_for(7000, "DESTROY")
    assert not udp_flows(fw)
    assert (new["type"], new["flow"]["rule"], new["flow"]["in"]) == ("NEW", "lan-to-wan", "lan")
    assert new["flow"]["timeout_seconds"] <= 1
    assert destroy["reason"] == "timeout"
    assert destroy["flow"]["id"] == new["flow"]["id"]
    assert destroy["flow"]["orig"]["packets"] == 1
    far.sendto(b"y", (net.client.address(family), 6000))  # an answer that comes too late is none
    fw.wait_for_drop(reason="policy", dport=6000)


@pytest.mark.parametrize("config", [SHORT], indirect=True)
def test_events_tell_a_tcp_life_and_add_up_to_the_counters(net: Network, fw: Daemon, family: int) -> None:
    with events(fw) as heard:
        near, far = tcp_pair(net.client, net.server, family, 8080)
        talk(near, far, b"hello")
        near.close()
        far.close()
        life = heard.wait_for(8080, "DESTROY")
        refused = net.client.open_socket(near.family, near.type)
        with pytest.raises(ConnectionRefusedError):
            refused.connect((net.server.address(family), 8081))
        short = heard.wait_for(8081, "DESTROY")
        for port in range(7000, 7050):
            udp_socket(net.client, family, port).sendto(b"x", (net.server.address(family), port))

        def told(name: str) -> int:
            return int(fw.stats()[name]) - int(heard.before[name])

        wait_until(
            lambda: told("insert") >= 52 and told("insert") == told("destroyed"), "all has begun and ended", 30.0
        )
        wait_until(lambda: heard.kinds()["DESTROY"] >= told("destroyed"), "all has been told")
        kinds, closed = heard.kinds(), Counter(row["reason"] for row in heard.rows() if row["type"] == "DESTROY")
        stats = fw.stats()
    states = [(row["type"], row["flow"]["state"]) for row in life]
    assert states[:3] == [("NEW", "SYN_SENT"), ("UPDATE", "SYN_RECV"), ("UPDATE", "ESTABLISHED")]
    assert states[-1] == ("DESTROY", "TIME_WAIT")
    assert "ASSURED" in life[2]["changes"]
    assert life[-1]["reason"] == "fin"
    assert [row["type"] for row in short] == ["NEW", "DESTROY"]
    assert (short[1]["reason"], short[1]["flow"]["state"]) == ("rst", "CLOSE")
    assert kinds["NEW"] == stats["insert"] - heard.before["insert"]
    assert kinds["DESTROY"] == stats["destroyed"] - heard.before["destroyed"]
    assert closed == {
        reason: count - heard.before["closed"][reason]
        for reason, count in stats["closed"].items()
        if count != heard.before["closed"][reason]
    }
    assert kinds["LOST"] == stats["events_lost"] == 0
