"""Many verdicts in one message: each packet gets its own, with its own mark, in order, and none is held back."""

from collections.abc import Iterator

import pytest

from conntrackd import config
from conntrackd.const import DROP, MARK_ESTABLISHED, MARK_NEW, MARK_RELATED, NF_ACCEPT
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.nfnetlink import (
    MARK_HEAD,
    NFQA_CFG_F_FAIL_OPEN,
    NFQA_CFG_F_GSO,
    VERDICT,
    set_flags,
    verdict_head,
)
from conntrackd.daemon.queue import LATENCY_BOUNDS_US, Queue
from conntrackd.hooks import Firewall
from conntrackd.policy.compile import compile as compile_ruleset
from tests.lab.daemon import queues
from tests.lab.network import Host, Network, wait_until
from tests.lab.traffic import Arrivals, udp_socket

QUEUE = 6
USERS_MARK = 0x5
MARK = Mark(0xFC000000)


def by_payload(fw: Firewall, data: bytes, hook: int, iif: int, now_ms: int, mark: int) -> int:
    """Decide by the last byte of the packet: every third is dropped, the others get three different marks."""
    return (DROP, MARK_NEW, MARK_ESTABLISHED, DROP, MARK_RELATED, MARK_NEW)[data[-1] % 6]


@pytest.fixture
def router(net: Network) -> Host:
    """The router marks UDP with a mark of its user's and hands it to the queue."""
    for rule in (f"MARK --set-mark {USERS_MARK}", f"NFQUEUE --queue-num {QUEUE}"):
        net.router.run("iptables-legacy", "-t", "raw", "-A", "PREROUTING", "-p", "udp", "-j", *rule.split())
    for bits in (MARK_NEW, MARK_ESTABLISHED, MARK_RELATED):
        value = f"{MARK.lay[bits] | USERS_MARK:#x}/0xffffffff"
        net.router.run("iptables-legacy", "-t", "filter", "-A", "FORWARD", "-m", "mark", "--mark", value)
    return net.router


@pytest.fixture
def queue(router: Host) -> Iterator[Queue]:
    checked = config.parse(b"version = 1\n", "test.toml")
    fw = Firewall(Conntrack(Sysctl()), compile_ruleset(checked, 1))
    made = Queue(QUEUE, fw, MARK, False, by_payload)
    router.call(lambda: made.bind(256, 1 << 20, NFQA_CFG_F_GSO))
    yield made
    made.unbind()


def send(net: Network, count: int) -> None:
    near = udp_socket(net.client, 4)
    for number in range(count):
        near.sendto(b"numbered" + bytes((number,)), (net.server.ipv4, 5300))
    wait_until(lambda: queues(net.router)[QUEUE].waiting == count, "the packets wait in the queue")


def counted(router: Host) -> list[int]:
    """Packets that each of the three marks was seen on in FORWARD."""
    lines = router.run("iptables-legacy", "-t", "filter", "-vnxL", "FORWARD").stdout.splitlines()
    return [int(line.split()[0]) for line in lines if "mark match" in line]


def test_each_packet_gets_its_own_verdict_and_mark_in_order(net: Network, router: Host, queue: Queue) -> None:
    arrivals = Arrivals(net.server)
    send(net, 60)
    assert queue.turn(64) is True
    assert queues(router)[QUEUE].waiting == 0
    passed = [number for number in range(60) if number % 3]
    wait_until(lambda: len(arrivals.having(b"numbered")) == len(passed), "what was accepted arrives")
    assert [packet[-1] for packet in arrivals.having(b"numbered")] == passed
    assert counted(router) == [20, 10, 10]
    assert (queue.packets, queue.dropped, queue.verdict_errors) == (60, 20, 0)


def test_no_verdict_waits_for_the_next_packet(net: Network, router: Host, queue: Queue) -> None:
    """A turn ends with its verdicts sent, whether the budget was spent or the queue was empty."""
    send(net, 10)
    assert queue.turn(4) is False
    assert queues(router)[QUEUE].waiting == 6
    assert queue.turn(100) is True
    assert queues(router)[QUEUE].waiting == 0


def test_a_verdict_that_the_kernel_does_not_know_spoils_no_other(net: Network, router: Host, queue: Queue) -> None:
    """A packet that went away while it waited (its interface went down) takes only its own verdict with it."""
    arrivals = Arrivals(net.server)
    send(net, 3)
    head = verdict_head(QUEUE, VERDICT.size)
    queue._verdicts.append(VERDICT.pack(head, NF_ACCEPT, 0x7FFFFFFF, MARK_HEAD, 0))
    assert queue.turn(64) is True
    wait_until(lambda: len(arrivals.having(b"numbered")) == 2, "the others arrive")
    assert queues(router)[QUEUE].waiting == 0


def test_packets_that_come_before_the_flags_are_set_come_again(net: Network, router: Host, queue: Queue) -> None:
    arrivals = Arrivals(net.server)
    send(net, 12)
    set_flags(queue.fileno(), QUEUE, NFQA_CFG_F_GSO | NFQA_CFG_F_FAIL_OPEN)
    wait_until(lambda: queue.turn(64) and queue.packets == 12, "they are queued again")
    wait_until(lambda: len(arrivals.having(b"numbered")) == 8, "what was accepted arrives")
    assert queues(router)[QUEUE].waiting == 0


def test_every_packet_is_in_the_latency_histogram(net: Network, queue: Queue) -> None:
    send(net, 12)
    queue.turn(5)
    queue.turn(64)
    assert sum(queue.latency) == queue.packets == 12
    assert len(queue.latency) == len(LATENCY_BOUNDS_US) + 1


def test_socket_buffer_is_what_the_kernel_granted(queue: Queue) -> None:
    assert queue.socket_memory()[1] >= 2 << 20
