"""Each thing that a rule can say, on real packets: what it lets through, and what it does not."""

import socket
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP
from scapy.layers.inet6 import ICMPv6DestUnreach, IPv6

from tests.lab.daemon import Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.traffic import AF, Arrivals, inject, talk, tcp_pair, udp_socket

ZONES = """\
version = 1
[zones]
lan = { interfaces = "lan" }
wan = { interfaces = "wan" }
"""


# A connection that was reset ends after a second, not after ten.
SOON = '[conntrack]\ntcp_timeout_close = "1s"\n'


def rule(action: str, text: str, name: str = "r") -> str:
    return f'[[rule]]\nname = "{name}"\naction = "{action}"\n{text}\n'


def asks(net: Network, family: int, port: int, what: bytes, source: str = "") -> socket.socket:
    """Send a datagram from the client to this port of the server."""
    client = udp_socket(net.client, family, 0, source)
    client.sendto(what, (net.server.address(family), port))
    return client


def test_zone_of_a_network(net: Network, family: int) -> None:
    inside = {4: "10.1.0.0/30", 6: "fd00:1::/126"}[family]
    outside = {4: "10.1.0.77", 6: "fd00:1::77"}[family]
    index = net.client.call(lambda: socket.if_nametoindex("eth0"))
    length = 64 if family == 6 else 24
    net.client.configure(lambda ipr: ipr.addr("add", index=index, address=outside, prefixlen=length))
    text = ZONES + f'desk = {{ interfaces = "lan", sources = "{inside}" }}\n' + rule("accept", 'from = "desk"')
    with daemon(net.router, text) as fw:
        server = udp_socket(net.server, family, 7000)
        asks(net, family, 7000, b"from elsewhere", outside)
        fw.wait_for_drop(src=outside, rule="default-forward")
        asks(net, family, 7000, b"from the desk")
        assert server.recv(100) == b"from the desk"


def test_sets_of_addresses_and_what_is_added_to_them(net: Network, family: int) -> None:
    client = net.client.address(family)
    text = ZONES + "[sets.blocked]\n" + rule("drop", 'source = "@blocked"', "blocked") + rule("accept", 'from = "lan"')
    with daemon(net.router, text) as fw:
        server = udp_socket(net.server, family, 7000)
        asks(net, family, 7000, b"free")
        assert server.recv(100) == b"free"
        assert "in blocked for 3600 s" in fw.cli("set", "add", "blocked", client, "--timeout", "1h").stdout
        asks(net, family, 7000, b"blocked")
        assert fw.wait_for_drop(src=client)["rule"] == "blocked"
        (entry,) = fw.json("set", "list", "blocked")
        assert entry["address"] == client
        assert 3500 < entry["timeout_seconds"] <= 3600
        # It stays through a reload.
        fw.cli("reload")
        assert len(fw.json("set", "list", "blocked")) == 1
        fw.cli("set", "del", "blocked", client)
        asks(net, family, 7000, b"free again")
        assert server.recv(100) == b"free again"
        # And one that ends by itself.
        fw.cli("set", "add", "blocked", client, "--timeout", "1s")
        wait_until(lambda: not fw.json("set", "list", "blocked") or None, "the entry ends")
        asks(net, family, 7000, b"free at last")
        assert server.recv(100) == b"free at last"


def test_what_a_set_refuses(net: Network) -> None:
    text = ZONES + '[sets.few]\naddresses = "192.0.2.0/24"\nsize = 1\n' + rule("drop", 'source = "@few"')
    with daemon(net.router, text) as fw:
        for arguments, says in (
            (("add", "fwe", "192.0.2.1"), "did you mean 'few'"),
            (("add", "few", "10.0.0.1/8"), "behind its prefix; did you mean '10.0.0.0/8'?\n"),
            (("add", "few", "x"), "no address or network"),
            (("del", "few", "192.0.2.0/24"), "stands in the configuration"),
            (("del", "few", "10.0.0.1"), "is not in few"),
        ):
            done = fw.cli("set", *arguments, check=False)
            assert (done.returncode, done.stdout) == (1, "")
            assert says in done.stderr
        assert "already" in fw.cli("set", "add", "few", "192.0.2.0/24").stdout
        fw.cli("set", "add", "few", "10.0.0.1")
        assert "is full" in fw.cli("set", "add", "few", "10.0.0.2", check=False).stderr
        assert fw.json("set", "list") == [{"name": "few", "configured": 1, "added": 1, "size": 1, "refused": 1}]


def test_negation(net: Network, family: int) -> None:
    server = net.server.address(family)
    with daemon(net.router, ZONES + rule("accept", f'from = "lan"\ndestination = "!{server}"')) as fw:
        asks(net, family, 7000, b"not there")
        fw.wait_for_drop(dst=server, rule="default-forward")
    with daemon(net.router, ZONES + rule("accept", f'from = "lan"\nsource = "!{server}"')):
        receiver = udp_socket(net.server, family, 7000)
        asks(net, family, 7000, b"there")
        assert receiver.recv(100) == b"there"


def test_services(net: Network, family: int) -> None:
    own = '[services]\ngame = ["udp/27000-27010"]\n'
    with daemon(net.router, ZONES + own + rule("accept", 'service = ["game", "ping"]')) as fw:
        server = udp_socket(net.server, family, 27010)
        asks(net, family, 27010, b"play")
        assert server.recv(100) == b"play"
        asks(net, family, 27011, b"not this")
        fw.wait_for_drop(dport=27011)
        net.client.run("ping", f"-{family}", "-c1", "-W5", net.server.address(family))


def test_state_invalid(net: Network, family: int) -> None:
    ip = IPv6 if family == 6 else IP
    text = ZONES + rule("accept", 'state = "invalid"\nfrom = "wan"\nprotocol = "tcp"\nport = 40000')
    with daemon(net.router, text) as fw:
        arrivals = Arrivals(net.client)
        for port in (40001, 40000):
            packet = ip(src=net.server.address(family), dst=net.client.address(family))
            inject(net.server, [bytes(packet / TCP(sport=80, dport=port, flags="SA") / b"stray")])
        arrivals.wait_for(b"stray")
        assert fw.wait_for_drop(dport=40001)["reason"] == "tcp_new"
        assert len(arrivals.having(b"stray")) == 1


def test_state_related(net: Network, family: int) -> None:
    """ICMP errors pass or not by rule, for the rest the policy drops them."""
    text = ZONES + '[policy]\nrelated = "drop"\n' + rule("accept", 'from = "lan"', "out")
    for more, passes in (("", False), (rule("accept", 'state = "related"\nfrom = "wan"\nto = "lan"'), True)):
        with daemon(net.router, text + more) as fw:
            client = udp_socket(net.client, family)
            client.connect((net.server.address(family), 7099))  # or it would not hear of errors
            client.send(b"nobody listens")
            if passes:
                with pytest.raises(ConnectionRefusedError):
                    client.recv(100)
            else:
                fw.wait_for_drop(reason="related")


def test_log_and_its_limit(net: Network, family: int) -> None:
    text = (
        ZONES + '[policy]\nlog_limit = "2/h"\n' + rule("log", "port = 7000\nprotocol = 'udp'", "l") + rule("accept", "")
    )
    with daemon(net.router, text) as fw:
        server = udp_socket(net.server, family, 7000)
        for number in range(5):
            asks(net, family, 7000, b"%d" % number)
            assert server.recv(100) == b"%d" % number
        wait_until(lambda: fw.log().count('"event": "packet"') == 2 or None, "two lines are logged")
        hits = {row["name"]: row["hits"] for row in fw.json("rules")}
        assert hits["l"] == 5
        assert '"rule": "l"' in fw.log()
        assert ":7000" in fw.log()


def test_log_of_what_a_rule_or_a_default_decides(net: Network, family: int) -> None:
    text = (
        ZONES
        + "[policy]\nlog_denied = true\n"
        + rule("accept", "protocol = 'udp'\nport = 7000\nlog = true", "said")
        + rule("accept", "protocol = 'udp'\nport = 7001", "unsaid")
    )
    with daemon(net.router, text) as fw:
        for port in (7001, 7000):
            server = udp_socket(net.server, family, port)
            asks(net, family, port, b"%d" % port)
            assert server.recv(100) == b"%d" % port
        asks(net, family, 7002, b"denied")
        wait_until(lambda: '"rule": "default-forward", "action": "drop"' in fw.log() or None, "the denied is logged")
        assert fw.log().count('"rule": "said", "action": "accept"') == 1
        assert "unsaid" not in fw.log()


def test_notrack(net: Network, family: int) -> None:
    text = (
        ZONES + rule("notrack", 'from = "lan"\nprotocol = "udp"\nport = 7000') + rule("accept", 'from = "lan"', "out")
    )
    with daemon(net.router, text) as fw:
        server = udp_socket(net.server, family, 7000)
        client = asks(net, family, 7000, b"question")
        data, address = server.recvfrom(100)
        assert data == b"question"
        server.sendto(b"answer", address)
        assert client.recv(100) == b"answer"
        other = udp_socket(net.server, family, 7001)
        asks(net, family, 7001, b"tracked")
        assert other.recv(100) == b"tracked"
        assert [flow["orig"]["dport"] for flow in fw.flows() if flow["protocol"] == "udp"] == [7001]


@pytest.mark.parametrize("per", ["rule", "src"])
def test_rate_limit(net: Network, family: int, per: str) -> None:
    second = {4: "10.1.0.77", 6: "fd00:1::77"}[family]
    index = net.client.call(lambda: socket.if_nametoindex("eth0"))
    length = 64 if family == 6 else 24
    net.client.configure(lambda ipr: ipr.addr("add", index=index, address=second, prefixlen=length))
    text = ZONES + rule("accept", f'from = "lan"\nlimit = {{ new = "3/h", per = "{per}" }}')
    with daemon(net.router, text) as fw:
        server = udp_socket(net.server, family, 7000)
        for number in range(4):
            asks(net, family, 7000, b"%d" % number)
        drop = fw.wait_for_drop(reason="rate_limit")
        assert drop["rule"] == "r"
        assert [server.recv(100) for _ in range(3)] == [b"0", b"1", b"2"]
        asks(net, family, 7000, b"second", second)
        if per == "src":
            assert server.recv(100) == b"second"
        else:
            fw.wait_for_drop(reason="rate_limit", src=second)


@pytest.mark.parametrize("key", ["max_flows", "max_flows_per_src"])
def test_connection_limit(net: Network, family: int, key: str) -> None:
    with daemon(net.router, ZONES + SOON + rule("accept", f'from = "lan"\n{key} = 2')) as fw:
        pairs = [tcp_pair(net.client, net.server, family, port) for port in (7001, 7002)]
        asks(net, family, 7000, b"one too many")
        assert fw.wait_for_drop(reason="connection_limit")["rule"] == "r"
        # One that ends makes room: a reset does at once what a timeout does later.
        near, far = pairs[0]
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        far.close()
        server = udp_socket(net.server, family, 7000)

        def answered() -> bool | None:
            asks(net, family, 7000, b"now")
            server.settimeout(0.2)
            try:
                return server.recv(100) == b"now"
            except TimeoutError:
                return None

        wait_until(answered, "there is room again", 40.0)
        near.close()


def test_mark_timeouts_and_the_rules_name(net: Network, family: int) -> None:
    text = ZONES + rule(
        "accept", 'from = "lan"\nmark = 0x2a\ntimeouts = { udp_timeout = "1h", tcp_timeout_established = "90s" }'
    )
    with daemon(net.router, text) as fw:
        server = udp_socket(net.server, family, 7000)
        asks(net, family, 7000, b"x")
        assert server.recv(100) == b"x"
        flow = fw.flow("udp", dport=7000)
        assert (flow["mark"], flow["rule"]) == (42, "r")
        assert 3590 < flow["timeout_seconds"] <= 3600
        near, far = tcp_pair(net.client, net.server, family, 80)
        talk(near, far, b"hello")
        assert 60 < fw.flow("tcp", dport=80)["timeout_seconds"] <= 90


def test_zone_of_the_tracker(net: Network, family: int) -> None:
    text = ZONES.replace('"lan" }', '"lan", conntrack_zone = 7 }').replace('"wan" }', '"wan", conntrack_zone = 7 }')
    with daemon(net.router, text + rule("accept", 'from = "lan"')) as fw:
        near, far = tcp_pair(net.client, net.server, family, 80)
        talk(near, far, b"hello")
        assert fw.flow("tcp", dport=80)["zone"] == 7
        # The zones of interfaces change with the policy: what comes now is of another zone.
        fw.write_config(ZONES + rule("accept", 'from = "lan"'))
        fw.cli("reload")
        server = udp_socket(net.server, family, 7000)
        asks(net, family, 7000, b"x")
        assert server.recv(100) == b"x"
        assert fw.flow("udp", dport=7000)["zone"] == 0


def test_counters_of_rules(net: Network, family: int) -> None:
    text = ZONES + SOON + rule("accept", 'from = "lan"', "out")
    text += rule("accept", 'from = "wan"\nprotocol = 99', "never")
    with daemon(net.router, text) as fw:
        near, far = tcp_pair(net.client, net.server, family, 80)
        talk(near, far, b"x" * 1000)
        talk(far, near, b"y" * 1000)
        flow = fw.flow("tcp", dport=80)
        rows = {row["name"]: row for row in fw.json("rules")}
        out = rows["out"]
        assert (out["hits"], out["flows"], out["live"]) == (1, 1, 1)
        assert out["packets"] >= flow["orig"]["packets"] + flow["reply"]["packets"] - 2
        assert out["bytes"] >= 2000
        assert out["last_hit"] is not None
        assert [row["name"] for row in fw.json("rules", "--unused")] == ["never"]
        # What has ended goes on counting.
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        near.close()

        def ended() -> list[dict[str, Any]]:
            return [row for row in fw.json("rules") if row["name"] == "out" and row["live"] == 0]

        (after,) = wait_until(ended, "the connection ends", 30.0)
        assert after["flows"] == 1
        assert after["bytes"] >= out["bytes"]


def test_table_full_may_let_pass(net: Network, family: int) -> None:
    for verdict in ("drop", "accept"):
        text = ZONES + f'[conntrack]\nmax = 1\nearly_drop_timeout = "1h"\n[exception]\ntable_full = "{verdict}"\n'
        with daemon(net.router, text + rule("accept", 'from = "lan"')) as fw:
            server = udp_socket(net.server, family, 7000)
            asks(net, family, 7000, b"first")
            assert server.recv(100) == b"first"
            asks(net, family, 7000, b"second")
            if verdict == "accept":
                assert server.recv(100) == b"second"
            else:
                fw.wait_for_drop(reason="table_full")
            assert len(fw.flows()) == 1
            server.close()


def test_explain_asks_the_running_policy(net: Network, fw: Daemon) -> None:
    steps = fw.json("explain", "tcp 10.2.0.2:1234 > 10.1.0.2:22")  # by the router's own routes
    assert [step["rule"] for step in steps] == ["lan-to-wan", "lan-to-router", "default-forward"]
    assert "comes from zone wan" in steps[0]["why"]
    steps = fw.json("explain", "tcp 10.1.0.2:1234 > 10.2.0.2:443 in lan out wan")
    assert [(step["rule"], step["matches"]) for step in steps] == [("lan-to-wan", True)]
    assert fw.json("explain", "udp [fd00:1::2]:5 > [fd00:1::1]:53")[-1]["rule"] == "lan-to-router"
    net.router.run("ip", "link", "add", "dmz0", "type", "veth", "peer", "name", "dmz1")
    wait_until(lambda: "dmz0" in {link["name"] for link in fw.status()["interfaces"]}, "the daemon knows it")
    for step in fw.json("explain", "tcp 10.1.0.2 > 10.2.0.2:443 in dmz0")[:2]:
        assert step["why"].startswith("it comes from dmz0, which is in no zone, not from zone lan")
    server = udp_socket(net.server, 4, 7000)
    client = asks(net, 4, 7000, b"x")
    assert server.recv(100) == b"x"
    known = fw.json("explain", f"udp 10.1.0.2:{client.getsockname()[1]} > 10.2.0.2:7000")
    assert "belongs to connection" in known[-1]["why"]
    before = fw.stats()["rules"]
    assert fw.cli("explain", "tcp 10.1.0.2 > 10.2.0.2:443").stdout.startswith("=> lan-to-wan (accept)")
    assert fw.stats()["rules"] == before
    for packet, says in (("tcp 1.2.3.4", "is not understood"), ("tcp 10.1.0.2 > 10.2.0.2:443 in lna", "'lan'")):
        done = fw.cli("explain", packet, check=False)
        assert done.returncode == 1
        assert says in done.stderr


# --- Reject -----------------------------------------------------------------------------------------------------


def test_reject_resets_tcp_at_once(net: Network, family: int) -> None:
    with daemon(net.router, ZONES + rule("reject", 'from = "lan"')) as fw:
        client = net.client.open_socket(AF[family], socket.SOCK_STREAM)
        with pytest.raises(ConnectionRefusedError):
            client.connect((net.server.address(family), 80))
        assert fw.wait_for_drop(dport=80)["rule"] == "r"
        assert fw.flows() == []
        fw.wait_for_empty_queues()


@pytest.mark.parametrize("way", ["input", "output"])
def test_reject_to_and_from_the_router(net: Network, family: int, way: str) -> None:
    with daemon(net.router, ZONES + f'[policy]\n{way} = "reject"\n'):
        router = {4: "10.1.0.1", 6: "fd00:1::1"}[family]
        if way == "input":
            client, target = net.client.open_socket(AF[family], socket.SOCK_STREAM), router
        else:
            client, target = net.router.open_socket(AF[family], socket.SOCK_STREAM), net.server.address(family)
        with pytest.raises(ConnectionRefusedError):
            client.connect((target, 80))


def test_reject_answers_a_segment_of_a_strange_connection_with_its_number(net: Network, family: int) -> None:
    """A RST to a segment with ACK has the number that it acknowledges: nothing else is believed."""
    ip = IPv6 if family == 6 else IP
    with daemon(net.router, ZONES + rule("reject", 'state = ["new", "invalid"]\nfrom = "lan"')) as fw:
        arrivals = Arrivals(net.client)
        head = ip(src=net.client.address(family), dst=net.server.address(family))
        inject(
            net.client,
            [
                bytes(head / TCP(sport=1111, dport=80, flags="PA", seq=5000, ack=0x01020304) / b"middle"),
                bytes(head / TCP(sport=2222, dport=80, flags="S", seq=7000) / b"data"),
                bytes(head / TCP(sport=3333, dport=80, flags="R", seq=7000)),
            ],
        )
        fw.wait_for_drop(sport=3333)

        def resets() -> list[TCP]:
            found = [ip(data)[TCP] for data in arrivals.packets() if data[0] >> 4 == family and TCP in ip(data)]
            return found if len(found) >= 2 else []

        first, second = wait_until(resets, "two resets arrive")
        assert (first.dport, str(first.flags), first.seq, first.ack) == (1111, "R", 0x01020304, 0)
        assert (second.dport, str(second.flags), second.seq, second.ack) == (2222, "RA", 0, 7000 + 1 + 4)


def test_reject_tells_by_icmp(net: Network, family: int) -> None:
    expected = {
        "auto": {4: 3, 6: 4},
        "port-unreachable": {4: 3, 6: 4},
        "host-unreachable": {4: 1, 6: 3},
        "admin-prohibited": {4: 13, 6: 1},
    }
    for how, codes in expected.items():
        with daemon(net.router, ZONES + rule("reject", f'from = "lan"\nreject_with = "{how}"')):
            arrivals = Arrivals(net.client)
            client = asks(net, family, 7000, b"quoted " + how.encode())

            def error(arrivals: Arrivals = arrivals) -> list[bytes]:
                # The client's own packet does not come back to it, only what quotes it.
                return arrivals.having(b"quoted ")

            (packet,) = wait_until(error, "the error arrives")
            if family == 4:
                parsed = IP(packet)
                assert (parsed[ICMP].type, parsed[ICMP].code, parsed.src) == (3, codes[4], "10.1.0.1")
                del parsed[ICMP].chksum
                assert bytes(IP(bytes(parsed)))[20:24] == packet[20:24]  # scapy computes the same checksum
            else:
                message = IPv6(packet)[ICMPv6DestUnreach]
                assert (message.code, IPv6(packet).src) == (codes[6], "fd00:1::1")
            client.close()


def test_reject_has_a_limit(net: Network) -> None:
    with daemon(net.router, ZONES + '[policy]\nreject_limit = "3/h"\n' + rule("reject", 'from = "lan"')) as fw:
        arrivals = Arrivals(net.client)
        for number in range(6):
            asks(net, 4, 7000 + number, b"limited")
        fw.wait_for_drop(dport=7005)
        fw.wait_for_empty_queues()
        arrivals.wait_for(b"limited", 3)
        assert len(arrivals.having(b"limited")) == 3


def test_answers_of_reject_do_not_come_back_to_the_queues(net: Network) -> None:
    with daemon(net.router, ZONES + '[policy]\nreject_limit = "1000/s"\n' + rule("reject", 'from = "lan"')) as fw:
        fw.wait_for_empty_queues()
        before = sum(queue.seen for queue in fw.queues().values())
        for number in range(50):
            asks(net, 4, 7000 + number, b"x")
        fw.wait_for_drop(dport=7049)
        # Each crosses both queues. Its answer does not, or there were 50 more; a few are the kernel's own (MLD, ND).
        assert 100 <= sum(queue.seen for queue in fw.queues().values()) - before < 150


LABELS = "[labels]\nvoip = 0\nguest = 100\n"


def test_labels(net: Network, family: int) -> None:
    """A rule sets them, the operator changes them, and they outlive a reload, a restart and a stop."""
    rules = rule("accept", 'from = "lan"\nprotocol = "udp"\nport = 7000\nlabels = ["voip", "guest"]', "phones")
    rules += rule("accept", 'from = "lan"', "others")
    with daemon(net.router, ZONES + LABELS + rules) as fw:

        def labels() -> dict[int, list[str] | None]:
            return {
                flow["orig"]["dport"]: flow.get("labels") for flow in fw.json("flows", "udp and dst port 7000-7001")
            }

        watching = net.router.start(*fw.command("events", "label guest", "-o", "table"))
        wait_until(lambda: fw.stats()["listeners"] == 1, "somebody listens")
        servers = [udp_socket(net.server, family, port) for port in (7000, 7001)]
        client = udp_socket(net.client, family)
        for server in servers:
            client.sendto(b"hello", server.getsockname())
            server.sendto(b"answer", server.recvfrom(100)[1])
            assert client.recv(100) == b"answer"
        assert labels() == {7000: ["voip", "guest"], 7001: None}
        watching.wait_for_output("NEW     udp")
        assert "labels=voip,guest" in watching.output()
        watching.stop()

        done = fw.cli("ct", "-U", "-p", "udp", "--dport", "7001", "--label-add", "voip", "-o", "labels")
        assert " labels=voip" in done.stdout
        assert done.stderr == "conntrack v1.4.7 (conntrack-tools): 1 flow entries have been updated.\n"
        fw.cli("label", "del", "voip", "rule phones")
        assert labels() == {7000: ["guest"], 7001: ["voip"]}
        assert fw.cli("ct", "-L", "-l", "guest", "-o", "labels").stdout.count(" labels=guest") == 1

        fw.write_config(ZONES + LABELS.replace("voip", "calls") + rules.replace("voip", "calls"))
        fw.cli("reload")
        assert labels() == {7000: ["guest"], 7001: ["calls"]}
        assert fw.cli("flows", "label voip", check=False).stderr.startswith("There is no label 'voip'")
        fw.restart()
        assert labels() == {7000: ["guest"], 7001: ["calls"]}
        assert fw.stop() == 0
        fw.start()
        assert labels() == {7000: ["guest"], 7001: ["calls"]}
        assert [flow["rule"] for flow in fw.json("flows", "label calls")] == ["others"]
