"""A restart in place on real packets: while the daemon becomes its next program, its deputy judges them."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.lab.daemon import POLICY, Daemon, daemon
from tests.lab.network import Network, wait_until
from tests.lab.traffic import talk, tcp_pair, udp_socket
from tests.netns.test_handover import Probes


@contextmanager
def deputy(fw: Daemon) -> Iterator[int]:
    """In the middle of a restart, with the daemon itself stopped: the deputy's process."""
    assert fw.process is not None
    asked = threading.Thread(target=fw.cli, args=("restart",), kwargs={"check": False})
    asked.start()
    fw.wait_for_log("deputy_begins")
    fw.process.signal(signal.SIGSTOP)
    try:
        assert "handover_caught_up" not in fw.log()
        found = re.search(r'"pid": (\d+), "event": "deputy_begins"', fw.log())
        assert found is not None
        yield int(found[1])
    finally:
        fw.process.signal(signal.SIGCONT)
        asked.join()


def test_packets_do_not_wait_for_the_next_program(net: Network, fw: Daemon) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 7)
    talk(near, far, b"before")
    ended, its_far = tcp_pair(net.client, net.server, 4, 7)
    before = fw.flow("tcp", sport=near.getsockname()[1])
    probes = Probes(udp_socket(net.client, 4), udp_socket(net.server, 4, 5300), 0.002)
    with probes.flowing():
        with deputy(fw):
            talk(near, far, b"go on")
            begun, its_server = tcp_pair(net.client, net.server, 4, 7)
            talk(begun, its_server, b"new")
            ended.close()
            its_far.close()
            first = probes.sent
            wait_until(lambda: any(seen > first for seen in probes.arrived), "probes arrive")
        fw.wait_for_log("handover_caught_up")
        talk(far, near, b"from outside")
        talk(its_server, begun, b"from outside, too")
    assert probes.lost() == set()
    assert fw.flow("tcp", sport=near.getsockname()[1])["id"] == before["id"]
    assert fw.flow("tcp", sport=begun.getsockname()[1])["state"] == "ESTABLISHED"
    assert fw.stats()["drops"].keys() <= {"policy"}
    for queue in fw.queues().values():
        assert (queue.dropped_full, queue.dropped_socket) == (0, 0)


def test_a_deputy_that_dies_takes_no_connection_along(net: Network, fw: Daemon) -> None:
    near, far = tcp_pair(net.client, net.server, 4, 7)
    talk(near, far, b"before")
    with deputy(fw) as pid:
        talk(near, far, b"what nobody will know of" * 10_000)
        process = Path(f"/proc/{pid}/stat")
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: process.read_text().split()[2] == "Z", "the deputy is dead")
    fw.wait_for_log("handover_changes_lost")
    fw.wait_for_log("queue_adopted", 2)
    talk(far, near, b"from outside")
    talk(near, far, b"and back")
    assert fw.stop() == 0


def test_a_deputy_does_not_outlive_the_daemon(net: Network, fw: Daemon) -> None:
    with deputy(fw) as pid:
        assert fw.process is not None
        fw.process.signal(signal.SIGKILL)
        wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the deputy has ended")
    assert fw.queues() == {}


def test_without_memory_for_a_deputy_packets_wait(net: Network) -> None:
    with daemon(net.router, POLICY, "--simulate", "fork:1", env={"CONNTRACKD_TEST": "1"}) as fw:
        near, far = tcp_pair(net.client, net.server, 4, 7)
        probes = Probes(udp_socket(net.client, 4), udp_socket(net.server, 4, 5300), 0.005)
        with probes.flowing():
            talk(near, far, b"before")
            fw.restart()
            fw.wait_for_log("handover_without_deputy")
            fw.wait_for_log("queue_adopted", 2)
            talk(far, near, b"from outside")
        assert "deputy_begins" not in fw.log()
        assert probes.lost() == set()
