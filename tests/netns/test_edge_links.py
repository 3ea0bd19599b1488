"""Interfaces and their changes, from the kernel of a namespace."""

import socket
from collections.abc import Iterator

import pytest

from conntrackd.daemon.links import Links
from tests.lab.network import Network, wait_until


@pytest.fixture
def links(net: Network) -> Iterator[Links]:
    made = net.router.call(Links)
    yield made
    made.close()


def index_of(net: Network, name: str) -> int:
    return net.router.call(lambda: socket.if_nametoindex(name))


def changed(links: Links) -> bool:
    """Whether there is a change in what has been told so far; reads it all."""
    found = links.read()
    for _ in range(100):
        found |= links.read()
    return found


def test_names_at_the_start(net: Network, links: Links) -> None:
    assert links.names[index_of(net, "lan")] == "lan"
    assert set(links.names.values()) == {"lo", "lan", "wan"}
    assert links.read() is False


def test_new_renamed_and_gone(net: Network, links: Links) -> None:
    net.router.run("ip", "link", "add", "new0", "type", "veth", "peer", "name", "new1")
    index = index_of(net, "new0")
    assert changed(links)
    assert links.names[index] == "new0"
    net.router.run("ip", "link", "set", "new0", "name", "other")
    assert changed(links)
    assert links.names[index] == "other"
    net.router.run("ip", "link", "set", "other", "up")
    assert not changed(links)
    net.router.run("ip", "link", "del", "other")
    wait_until(lambda: changed(links) or index not in links.names, "the end of the link is told")
    assert set(links.names.values()) == {"lo", "lan", "wan"}


def test_leaving_a_bridge_is_no_end(net: Network, links: Links) -> None:
    for command in (
        "ip link add br0 type bridge",
        "ip link add port type veth peer name cable",
        "ip link set port master br0",
        "ip link set port nomaster",
    ):
        net.router.run(*command.split())
    changed(links)
    assert links.names[index_of(net, "port")] == "port"


def test_more_changes_than_the_socket_holds(net: Network, links: Links) -> None:
    links._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    for number in range(20):
        net.router.run("ip", "link", "add", f"a{number}", "type", "veth", "peer", "name", f"b{number}")
    assert net.router.call(lambda: changed(links))
    assert {name for name in links.names.values() if name[0] in "ab"} == {
        f"{side}{number}" for side in "ab" for number in range(20)
    }


def test_broadcast_addresses(net: Network, links: Links) -> None:
    """Of each network once, whichever addresses the router has in it; and kept up to date."""
    index = index_of(net, "lan")
    mask = bytes((255, 255, 240, 0))
    before = dict(links.broadcasts)
    for address in "10.9.0.1/20", "10.9.0.2/20":
        net.router.run("ip", "address", "add", address, "brd", "+", "dev", "lan")

    def read() -> dict[bytes, bytes]:
        # An address is no change of the names.
        assert changed(links) is False
        return links.broadcasts

    wait_until(lambda: read() == {**before, bytes((10, 9, 15, 255)): mask}, "the broadcast address is known")
    net.router.configure(lambda ipr: ipr.flush_addr(index=index))
    wait_until(lambda: bytes((10, 9, 15, 255)) not in read(), "the broadcast address is gone")
