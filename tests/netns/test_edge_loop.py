"""The loop: alive under a flood, deaf to SIGHUP, and gone without a trace when told to stop."""

import json
import signal
import sys
from collections.abc import Iterator

import pytest

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, Process, wait_until
from tests.lab.traffic import udp_socket

FLOOD = """
import socket, sys
flood = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
count = 0
while True:
    count += 1
    try:
        flood.sendto(b"flood", (sys.argv[1], 1024 + count % int(sys.argv[2])))
    except OSError:
        pass
"""


@pytest.fixture(params=[1, 20000], ids=["one flow", "new flows"])
def flood(request: pytest.FixtureRequest, net: Network, fw: Daemon) -> Iterator[Process]:
    """More packets than the daemon can take, until its queue runs over."""
    sender = net.client.start(sys.executable, "-c", FLOOD, net.server.ipv4, str(request.param))
    # Compiled it may keep up with one sender, so it is held until its queue is full.
    assert fw.process is not None
    fw.process.signal(signal.SIGSTOP)
    wait_until(lambda: fw.queues()[0].dropped_full > 0, "the queue runs over", 30.0)
    fw.process.signal(signal.SIGCONT)
    yield sender
    sender.kill()


def test_flood_leaves_clients_and_timers_alive(net: Network, fw: Daemon, flood: Process) -> None:
    uptime = fw.status()["uptime_seconds"]
    packets = fw.status()["queues"][0]["packets"]
    assert fw.flows()
    # Connections that expire are swept, and unconfirmed ones forgotten, by timers.
    wait_until(lambda: fw.status()["uptime_seconds"] > uptime + 1, "the clock goes on")
    status = fw.status()
    assert status["queues"][0]["packets"] > packets
    assert flood.running
    # What was let in at the first queue is let out at the second: none of it is lost.
    assert (status["queues"][1]["dropped_full"], status["queues"][1]["dropped_socket"]) == (0, 0)
    flood.kill()
    wait_until(lambda: all(queue.waiting == 0 for queue in fw.queues().values()), "the queues are empty")
    net.client.run("ping", "-n", "-c", "1", net.server.ipv4)


def test_stop_under_a_flood(fw: Daemon, flood: Process) -> None:
    assert fw.stop() == 0
    assert flood.running
    assert not fw.socket_path.exists()
    assert fw.queues() == {}
    assert "Traceback" not in fw.log()
    assert json.loads(fw.log().splitlines()[-1])["event"] == "stopping"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stop_gives_verdicts_to_what_waits(quiet_net: Network, number: signal.Signals) -> None:
    """Packets that came while the daemon was held still pass before it ends."""
    with daemon(quiet_net.router, POLICY) as fw:
        assert fw.process is not None
        near, far = udp_socket(quiet_net.client, 4), udp_socket(quiet_net.server, 4, 5300)
        near.sendto(b"0", far.getsockname())  # so that neighbours are known
        assert far.recv(10) == b"0"
        fw.process.signal(signal.SIGSTOP)
        for payload in (b"1", b"2", b"3"):
            near.sendto(payload, far.getsockname())
        wait_until(lambda: fw.queues()[0].waiting == 3, "the packets wait")
        fw.process.signal(number)
        fw.process.signal(signal.SIGCONT)
        assert fw.process.wait() == 0
        assert [far.recv(10) for _ in range(3)] == [b"1", b"2", b"3"]


def test_hangup_is_no_reason_to_stop(net: Network, fw: Daemon) -> None:
    assert fw.process is not None
    for _ in range(20):
        fw.process.signal(signal.SIGHUP)
    net.client.run("ping", "-n", "-c", "1", net.server.ipv4)
    assert fw.status()["pid"] == fw.process.pid


def test_interfaces_are_followed(net: Network, fw: Daemon) -> None:
    assert {link["name"]: link["zone"] for link in fw.status()["interfaces"]} == {
        "lo": None, "lan": "lan", "wan": "wan",
    }  # fmt: skip
    net.router.run("ip", "link", "set", "wan", "down")
    net.router.run("ip", "link", "set", "wan", "name", "elsewhere")
    net.router.run("ip", "link", "set", "elsewhere", "up")
    wait_until(
        lambda: (
            {"elsewhere": None}.items() <= {link["name"]: link["zone"] for link in fw.status()["interfaces"]}.items()
        ),
        "the new name is known",
    )
    wait_until(
        lambda: (
            net.client.run("ping", "-n", "-c", "1", "-W", "1", net.server.ipv4, check=False).returncode == 1
            and "elsewhere" in {drop["out"] for drop in fw.drops()}
        ),
        "what goes to an interface without a zone is dropped",
    )
