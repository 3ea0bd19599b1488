"""Failures on purpose, for tests: `conntrackd run --simulate KIND:NUMBER[:MORE]`, refused without CONNTRACKD_TEST=1.

    exception:N    the Nth packet meets a mistake of ours
    memory:N       the Nth packet finds no memory left
    slow:N:MS      the Nth packet takes so long
    enobufs:N      the Nth read from a queue says that the kernel had no room for packets
    verdict:N      the kernel does not take the Nth message with verdicts, of the tracking queue
    request:N      the Nth request on the control socket finds no memory left
    suspend:N:S    with the Nth packet the machine has slept for so many seconds
    clock:N:S      with the Nth packet the wall clock is set forward by so many seconds
    fork:N         no process is to be had for the Nth deputy
    disk:N:COUNT   the Nth write of a snapshot has room for half, and the next COUNT find the disk full

Nothing of this is there when no failure is asked for: the daemon is given the real parts.
"""

import errno
import os
import time
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from conntrackd.daemon.clock import Clock
from conntrackd.daemon.control import Answer
from conntrackd.daemon.mmsg import Inbox
from conntrackd.daemon.statefile import WriteDisk
from conntrackd.hooks import Firewall, pre_routing

SWITCH: Final = "CONNTRACKD_TEST"
KINDS: Final = {
    "exception": "N", "memory": "N", "slow": "N:MS", "enobufs": "N", "verdict": "N", "request": "N",
    "suspend": "N:S", "clock": "N:S", "fork": "N", "disk": "N:COUNT",
}  # fmt: skip

Track = Callable[[Firewall, bytes, int, int, int, int], int]
P = ParamSpec("P")
R = TypeVar("R")


class SimulateError(Exception):
    """The simulation is refused; the text is one sentence."""


class Parts:
    """The parts of the daemon that can fail on purpose; these are the real ones."""

    def __init__(self) -> None:
        self.clock: Callable[[bool], Clock] = Clock
        self.track: Track = pre_routing
        self.inbox: Callable[[int, int], Inbox] = Inbox
        self.write: Callable[[int, bytes], int] = os.write
        self.write_disk: WriteDisk = os.write
        self.fork: Callable[[], int] = os.fork
        self.answer: Callable[[Answer], Answer] = lambda answer: answer


def parts(simulate: str | None) -> Parts:
    """Give the real parts, or with `simulate` one that fails. Raises SimulateError."""
    found = Parts()
    if simulate is None:
        return found
    if os.environ.get(SWITCH) != "1":
        raise SimulateError(f"--simulate is for tests only: it needs {SWITCH}=1 in the environment.")
    kind, *numbers = simulate.split(":")
    count = len(KINDS[kind].split(":")) if kind in KINDS else -1
    if len(numbers) != count or not all(number.isdecimal() for number in numbers):
        known = ", ".join(f"{name}:{form}" for name, form in KINDS.items())
        raise SimulateError(f"--simulate {simulate} is not known: it takes one of {known}.")
    at, more = int(numbers[0]), int(numbers[-1])
    if kind == "exception":
        found.track = _before(_Nth(at, _mistake), pre_routing)
    elif kind == "memory":
        found.track = _before(_Nth(at, _no_memory), pre_routing)
    elif kind == "slow":
        found.track = _before(_Nth(at, lambda: time.sleep(more / 1000)), pre_routing)
    elif kind == "enobufs":
        found.inbox = lambda slots, size: _Overrun(slots, size, _Nth(at, _no_room))
    elif kind == "verdict":
        found.write = _before(_Nth(at, _no_room), os.write)
    elif kind == "request":
        found.answer = lambda answer: _before(_Nth(at, _no_memory), answer)
    elif kind == "fork":
        found.fork = _before(_Nth(at, _no_process), os.fork)
    elif kind == "disk":
        found.write_disk = _FullDisk(at, more)
    else:
        clocks = {time.CLOCK_REALTIME} | ({time.CLOCK_BOOTTIME} if kind == "suspend" else set())
        leap = _Leap(clocks, more)
        found.clock = lambda through_suspend: _LeapingClock(through_suspend, leap)
        found.track = _before(_Nth(at, leap), pre_routing)
    return found


class _Nth:
    """Does something the Nth time that it is called."""

    def __init__(self, number: int, act: Callable[[], None]) -> None:
        self._left = number
        self._act = act

    def __call__(self) -> None:
        self._left -= 1
        if self._left == 0:
            self._act()


def _before(first: Callable[[], None], function: Callable[P, R]) -> Callable[P, R]:
    def both(*args: P.args, **kwargs: P.kwargs) -> R:
        first()
        return function(*args, **kwargs)

    return both


def _mistake() -> None:
    raise RuntimeError("simulated failure")


def _no_memory() -> None:
    raise MemoryError


def _no_room() -> None:
    raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))


def _no_process() -> None:
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


class _Overrun(Inbox):
    def __init__(self, slots: int, size: int, before: _Nth) -> None:
        super().__init__(slots, size)
        self._before = before

    def receive(self, fd: int, count: int) -> int:
        self._before()
        return super().receive(fd, count)


class _FullDisk:
    """As a disk fills up: one write in part, then none, until somebody makes room."""

    def __init__(self, number: int, count: int) -> None:
        self._left = number
        self._full = count

    def __call__(self, fd: int, data: memoryview) -> int:
        self._left -= 1
        if self._left == 0:
            return os.write(fd, data[: len(data) // 2])
        if self._left < 0 and self._full:
            self._full -= 1
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(fd, data)


class _Leap:
    """Some of the system's clocks, and how far they are ahead once it has been called."""

    def __init__(self, clocks: set[int], seconds: int) -> None:
        self.clocks = clocks
        self.ahead_ms = 0
        self._seconds = seconds

    def __call__(self) -> None:
        self.ahead_ms = self._seconds * 1000


class _LeapingClock(Clock):
    def __init__(self, through_suspend: bool, leap: _Leap) -> None:
        self._leap = leap
        super().__init__(through_suspend)

    def read_ms(self, clock: int) -> int:
        return super().read_ms(clock) + (self._leap.ahead_ms if clock in self._leap.clocks else 0)
