"""One queue on real packets: budgets, and a verdict on every path."""

import errno
import os
from collections.abc import Iterator
from typing import Any

import pytest
from structlog.testing import capture_logs

from conntrackd import config
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.mmsg import Inbox
from conntrackd.daemon.queue import LOG_PAUSE_MS, Queue, QueueError
from conntrackd.hooks import Firewall, pre_routing
from conntrackd.policy.compile import compile as compile_ruleset
from tests.lab.daemon import queues
from tests.lab.network import Host, Network, wait_until
from tests.lab.traffic import Arrivals, udp_socket

MAX_LENGTH = 64
BUFFER = 1 << 20


class Failing:
    """Tracks as usual until told to fail."""

    def __init__(self) -> None:
        self.fails = False

    def __call__(self, fw: Firewall, data: bytes, hook: int, iif: int, now_ms: int, mark: int) -> int:
        if self.fails:
            raise ZeroDivisionError
        return pre_routing(fw, data, hook, iif, now_ms, mark)


def make(number: int, track: Failing, accept_on_error: bool = False, **parts: Any) -> Queue:
    checked = config.parse(b"version = 1\n", "test.toml")
    fw = Firewall(Conntrack(Sysctl()), compile_ruleset(checked, 1))
    return Queue(number, fw, Mark(0xFC000000), accept_on_error, track, **parts)


@pytest.fixture
def router(net: Network) -> Host:
    """The router hands UDP to queue 5 at PREROUTING; nothing is at the other hooks."""
    net.router.run("iptables-legacy", "-t", "raw", "-A", "PREROUTING", "-p", "udp", "-j", "NFQUEUE", "--queue-num", "5")
    return net.router


@pytest.fixture
def track() -> Failing:
    return Failing()


@pytest.fixture(params=[False, True], ids=["drop", "accept"])
def queue(request: pytest.FixtureRequest, router: Host, track: Failing) -> Iterator[Queue]:
    """Queue 5, bound, with each verdict for failures."""
    made = make(5, track, request.param)
    router.call(lambda: made.bind(MAX_LENGTH, BUFFER, 0))
    yield made
    made.unbind()


def send(net: Network, count: int, seen: int = 0) -> None:
    """Send packets through the router; the queue has seen `seen` (`count` if not said) in all when it returns."""
    near = udp_socket(net.client, 4)
    for number in range(count):
        near.sendto(b"packet %d" % number, (net.server.ipv4, 5300))
    wait_until(lambda: queues(net.router)[5].seen >= (seen or count), "the packets are in the queue")


def test_a_turn_ends_with_its_budget(net: Network, queue: Queue) -> None:
    send(net, 10)
    assert queue.turn(4) is False
    assert queues(net.router)[5].waiting == 6
    assert queue.turn(6) is False  # it can't know that it took the last one
    assert queue.turn(4) is True
    assert queues(net.router)[5].waiting == 0
    assert (queue.packets, queue.dropped, queue.errors) == (10, 0, 0)


def test_failures_end_in_the_configured_verdict(net: Network, queue: Queue, track: Failing) -> None:
    arrivals = Arrivals(net.server)
    accepts = queue.accept_on_error
    with capture_logs() as logs:
        track.fails = True
        send(net, 10)
        assert queue.turn(4) is False  # the budget counts failures as well
        assert queue.turn(64) is True
    assert queues(net.router)[5].waiting == 0
    assert (queue.packets, queue.dropped, queue.errors) == (10, 0 if accepts else 10, 10)
    (entry,) = logs
    assert (entry["event"], entry["verdict"]) == ("packet_failed", "accept" if accepts else "drop")

    track.fails = False
    send(net, 11, 21)
    queue.turn(64)
    # The packet after the failures was sent last and has arrived: what was accepted before it has as well.
    near = udp_socket(net.client, 4)
    near.sendto(b"the last", (net.server.ipv4, 5300))
    wait_until(lambda: queue.turn(64) and arrivals.having(b"the last"), "the last packet arrives")
    assert len(arrivals.having(b"packet 9")) == (2 if accepts else 1)


def test_failures_are_logged_once_a_second(net: Network, queue: Queue, track: Failing) -> None:
    track.fails = True
    with capture_logs() as logs:
        for turn, now_ms in enumerate((5000, 5000 + LOG_PAUSE_MS - 1, 5000 + LOG_PAUSE_MS), start=1):
            queue.now_ms = now_ms
            send(net, 3, 3 * turn)
            queue.turn(64)
    assert [entry["suppressed"] for entry in logs] == [0, 5]
    assert queue.errors == 9


def test_second_owner_is_told_who_has_it(router: Host, queue: Queue) -> None:
    with pytest.raises(QueueError, match="Queue 5 is already bound by"):
        router.call(lambda: make(5, Failing()).bind(MAX_LENGTH, BUFFER, 0))


def test_length_and_copy_range_are_the_kernels(net: Network, queue: Queue) -> None:
    """More packets than the queue is long: the rest is dropped by the kernel, and no more."""
    (line,) = net.router.read("net/netfilter/nfnetlink_queue").splitlines()
    assert line.split()[4] == "3900"
    near = udp_socket(net.client, 4)
    for _ in range(MAX_LENGTH + 10):
        near.sendto(b"x", (net.server.ipv4, 5300))
    wait_until(lambda: queues(net.router)[5].dropped_full == 10, "the queue runs over")
    assert queues(net.router)[5].waiting == MAX_LENGTH
    while not queue.turn(16):
        pass
    assert queue.packets == MAX_LENGTH


class Forgetful(Inbox):
    """Finds no memory for a message until told otherwise."""

    fails = True

    def message(self, slot: int) -> bytes:
        if self.fails and slot > 1:
            raise MemoryError
        return super().message(slot)


def test_no_memory_in_the_middle_leaves_no_packet_without_a_verdict(net: Network, router: Host) -> None:
    inboxes = []

    def inbox(slots: int, size: int) -> Inbox:
        inboxes.append(Forgetful(slots, size))
        return inboxes[-1]

    queue = make(5, Failing(), inbox=inbox)
    router.call(lambda: queue.bind(MAX_LENGTH, BUFFER, 0))
    try:
        send(net, 10)
        with pytest.raises(MemoryError):
            queue.turn(64)
        with pytest.raises(MemoryError):  # not even for the verdict
            queue.turn(64)
        assert queues(net.router)[5].waiting == 10
        inboxes[0].fails = False
        queue.turn(64)
        assert queues(net.router)[5].waiting == 0
        assert queue.errors == 1
    finally:
        queue.unbind()


def test_verdicts_that_are_not_taken_are_kept(net: Network, router: Host) -> None:
    refuses = True

    def write(fd: int, message: bytes) -> int:
        if refuses:
            raise OSError(errno.ENOBUFS, "no room")
        return os.write(fd, message)

    queue = make(5, Failing(), write=write)
    router.call(lambda: queue.bind(MAX_LENGTH, BUFFER, 0))
    try:
        with capture_logs() as logs:
            send(net, 3)
            queue.turn(64)
            send(net, 3, 6)
            queue.turn(64)
        assert queues(net.router)[5].waiting == 6
        assert queue.verdict_errors >= 2
        assert [entry["event"] for entry in logs] == ["verdicts_refused"]
        refuses = False
        queue.send()
        assert queues(net.router)[5].waiting == 0
    finally:
        queue.unbind()
