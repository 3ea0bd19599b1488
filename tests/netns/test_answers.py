"""The router's own answers to packets that it does not let through: the sender gets them."""

import pytest

from tests.lab.daemon import Daemon
from tests.lab.network import Network

NOWHERE = {4: "192.0.2.1", 6: "2001:db8::1"}  # the router has no route there


def test_time_exceeded_reaches_the_sender(net: Network, fw: Daemon, family: int) -> None:
    """The first hop of a traceroute."""
    done = net.client.run("ping", "-c", "1", "-W", "10", "-t", "1", net.server.address(family), check=False)
    assert "Time to live exceeded" in done.stdout or "Time exceeded" in done.stdout
    assert fw.stats()["ctinfo"]["related_reply"] == 1


def test_no_route_reaches_the_sender(net: Network, fw: Daemon, family: int) -> None:
    done = net.client.run("ping", "-c", "1", "-W", "10", NOWHERE[family], check=False)
    assert "nreachable" in done.stdout or "No route" in done.stdout


@pytest.mark.parametrize("how", ["icmp", "reset"])
def test_reject_of_the_routers_own_rules_reaches_the_sender(net: Network, fw: Daemon, family: int, how: str) -> None:
    tool = "ip6tables-legacy" if family == 6 else "iptables-legacy"
    kind = "tcp-reset" if how == "reset" else ("icmp6" if family == 6 else "icmp") + "-port-unreachable"
    net.router.run(tool, "-A", "FORWARD", "-p", "tcp", "--dport", "81", "-j", "REJECT", "--reject-with", kind)
    done = net.client.run("nc", "-z", "-v", "-w", "5", net.server.address(family), "81", check=False)
    assert "refused" in done.stderr
    assert not [flow for flow in fw.flows() if flow["protocol"] == "tcp"]
