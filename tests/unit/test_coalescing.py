"""How long the loop waits for packets to come together."""

import pytest

from conntrackd.config import parse
from conntrackd.core.net import Conntrack
from conntrackd.core.sysctl import Sysctl
from conntrackd.daemon.coalescing import LOOK_MS, MANY, PAUSE_MAX_S, PAUSE_MIN_S, TOGETHER, Coalescing
from conntrackd.daemon.mark import Mark
from conntrackd.daemon.queue import Queue
from conntrackd.hooks import Firewall
from conntrackd.policy.compile import compile as compile_ruleset

NOW_MS = 1_000_000
SMALL, BIG = 150, 4000  # bytes of the kernel's messages


@pytest.fixture
def queue() -> Queue:
    fw = Firewall(Conntrack(Sysctl()), compile_ruleset(parse(b"version = 1\n", "test.toml"), generation=1))
    return Queue(0, fw, Mark(0xFF000000), accept_on_error=False)


def pause_s(queue: Queue, *looks: tuple[int, int]) -> float:
    """What comes out when so many packets per millisecond, in messages of such a size, have come before each look."""
    coalescing = Coalescing([queue], NOW_MS)
    now_ms = NOW_MS
    for per_ms, size in looks:
        now_ms += LOOK_MS
        queue.packets += per_ms * LOOK_MS
        queue.message_bytes += per_ms * LOOK_MS * size
        coalescing.look(now_ms)
        assert coalescing.look_ms == now_ms + LOOK_MS
    return coalescing.pause_s


def test_small_packets_that_are_many_are_waited_for(queue: Queue) -> None:
    assert pause_s(queue, (MANY + 1, SMALL)) == PAUSE_MAX_S


def test_the_more_come_the_shorter_is_the_wait(queue: Queue) -> None:
    assert pause_s(queue, (40, SMALL)) == pytest.approx(TOGETHER / 40 / 1000)


def test_so_many_that_they_come_together_by_themselves_are_not(queue: Queue) -> None:
    assert pause_s(queue, (TOGETHER * 10, SMALL)) == pytest.approx(PAUSE_MIN_S)
    assert pause_s(queue, (TOGETHER * 10 + 1, SMALL)) == 0.0


@pytest.mark.parametrize("look", [(MANY, SMALL), (40, BIG), (0, 0)], ids=["few", "big", "none"])
def test_others_are_not(queue: Queue, look: tuple[int, int]) -> None:
    assert pause_s(queue, look) == 0.0


def test_only_what_came_since_the_last_look_counts(queue: Queue) -> None:
    assert pause_s(queue, (1000, SMALL), (MANY, SMALL)) == 0.0
    assert pause_s(queue, (1000, BIG), (40, SMALL)) > 0.0
