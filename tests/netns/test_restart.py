"""The daemon goes away and comes back: what passes meanwhile, and what becomes of living connections."""

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.traffic import Arrivals, talk, tcp_pair, udp_socket

BYPASS = POLICY + "\n[queue]\nbypass = true\n"


def answers(net: Network, family: int) -> bool:
    """Whether the server answers a ping of the client."""
    ping = net.client.run("ping", "-n", "-c", "1", "-W", "1", net.server.address(family), check=False)
    return ping.returncode == 0


def wait_for_answer(net: Network, family: int) -> None:
    # Neighbours that could not be asked meanwhile may be asked again only after a second.
    wait_until(lambda: answers(net, family), "the server answers")


def test_killed_it_fails_closed(net: Network, fw: Daemon, family: int) -> None:
    wait_for_answer(net, family)
    fw.kill()
    assert fw.queues() == {}
    assert not answers(net, family)
    fw.start()
    wait_for_answer(net, family)


def test_stopped_it_fails_closed(net: Network, fw: Daemon, family: int) -> None:
    assert fw.stop() == 0
    assert not fw.socket_path.exists()
    assert not answers(net, family)
    fw.start()
    wait_for_answer(net, family)


def test_killed_with_bypass_packets_pass(net: Network, family: int) -> None:
    with daemon(net.router, BYPASS) as fw:
        inside = udp_socket(net.client, family, 5300)
        outside = udp_socket(net.server, family)
        arrivals = Arrivals(net.client)
        outside.sendto(b"while it runs", inside.getsockname())
        fw.wait_for_drop(protocol="udp", dport=5300)
        assert not arrivals.having(b"while it runs")

        fw.kill()
        wait_for_answer(net, family)
        outside.sendto(b"while it is gone", inside.getsockname())
        assert inside.recv(100) == b"while it is gone"

        fw.start()
        outside.sendto(b"now it is back", inside.getsockname())
        fw.wait_for_drop(protocol="udp", dport=5300)
        assert not arrivals.having(b"now it is back")


def test_living_tcp_connections_are_picked_up(net: Network, fw: Daemon, family: int) -> None:
    near, far = tcp_pair(net.client, net.server, family, 7)
    talk(near, far, b"before")
    talk(far, near, b"before")
    fw.kill()
    fw.start()
    assert fw.flows() == []

    talk(near, far, b"question" * 1000)
    talk(far, near, b"answer" * 1000)
    flow = fw.flow("tcp", dport=7)
    assert flow["state"] == "ESTABLISHED"
    assert {"SEEN_REPLY", "CONFIRMED"} <= set(flow["status"])
    assert (flow["in"], flow["out"], flow["rule"]) == ("lan", "wan", "lan-to-wan")


def test_the_outside_does_not_pick_up(net: Network, fw: Daemon, family: int) -> None:
    """After a restart the policy decides who may go on: a connection that the inside let in by nobody's rule."""
    near, far = tcp_pair(net.client, net.server, family, 7)
    fw.kill()
    fw.start()
    arrivals = Arrivals(net.client)
    far.sendall(b"from outside")
    drop = fw.wait_for_drop(protocol="tcp", sport=7)
    assert (drop["reason"], drop["rule"]) == ("policy", "default-forward")
    assert not arrivals.having(b"from outside")
    # As soon as the inside speaks, the connection lives on, and the retransmission arrives.
    near.sendall(b"from inside")
    assert far.recv(100) == b"from inside"
    near.settimeout(30.0)
    assert near.recv(100) == b"from outside"
