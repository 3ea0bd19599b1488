"""Fixtures for tests on real packets: a network, and a daemon with the common policy in its router."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, network

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.netns)


@pytest.fixture
def net() -> Iterator[Network]:
    """A network without any rule and daemon."""
    with network() as built:
        yield built


@pytest.fixture
def quiet_net(net: Network) -> Network:
    """IPv4 alone: no neighbour discovery nor multicast listeners, so that packets can be numbered."""
    for host in net.hosts:
        host.sysctl("net/ipv6/conf/all/disable_ipv6", 1)
    return net


@pytest.fixture
def fw(net: Network) -> Iterator[Daemon]:
    """The daemon with the common policy, its rules installed."""
    with daemon(net.router, POLICY) as running:
        yield running


@pytest.fixture(params=[4, 6], ids=["ipv4", "ipv6"])
def family(request: pytest.FixtureRequest) -> int:
    """Runs the test over IPv4 and over IPv6."""
    number: int = request.param
    return number
